"""Run the command: `python -m alignment.space`."""

import sys

if __name__ == "__main__":
    try:
        from alignment.space.command import main

        sys.exit(main())
    except KeyboardInterrupt:  # while modules are imported; `main` handles later ones
        sys.exit(130)
