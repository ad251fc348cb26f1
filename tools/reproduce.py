"""``polyfocal reproduce`` in a clone."""

import sys

from polyfocal.commands.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
