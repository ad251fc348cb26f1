"""``polyfocal tune`` in a clone."""

import sys

from polyfocal.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
