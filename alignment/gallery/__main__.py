"""Run the command: `python -m alignment.gallery`."""

import sys

if __name__ == "__main__":
    try:
        from alignment.gallery.command import main

        sys.exit(main())
    except KeyboardInterrupt:  # while all was being imported; later ones are told what is kept
        sys.exit(130)
