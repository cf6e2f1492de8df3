"""Run `python -m alignment.train`."""

import sys

if __name__ == "__main__":
    try:
        from alignment.train.command import main

        sys.exit(main())
    except KeyboardInterrupt:  # while all was being imported
        sys.exit(130)
