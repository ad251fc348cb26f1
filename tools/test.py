"""``polyfocal test`` in a clone."""

import sys

from polyfocal.commands.test import main

if __name__ == "__main__":
    sys.exit(main())
