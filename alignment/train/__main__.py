"""Run the command: `python -m alignment.train --help`."""

import sys

if __name__ == "__main__":
    try:
        from alignment.train.command import main

        sys.exit(main())
    except KeyboardInterrupt:  # during the imports
        sys.exit(130)
