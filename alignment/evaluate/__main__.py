"""Run the command: `python -m alignment.evaluate --help`."""

from alignment.evaluate.command import main

if __name__ == "__main__":
    main()
