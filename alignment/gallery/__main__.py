"""Run the command: `python -m alignment.gallery`."""

import sys

from alignment.gallery.command import main

if __name__ == "__main__":
    sys.exit(main())
