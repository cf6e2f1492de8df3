"""Run the command: `python -m alignment.space`."""

import sys

from alignment.space.command import main

if __name__ == "__main__":
    sys.exit(main())
