"""Run `python -m alignment.train`."""

from alignment.train.command import main

if __name__ == "__main__":
    main()
