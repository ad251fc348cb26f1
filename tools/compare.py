"""``polyfocal compare`` in a clone."""

import sys

from polyfocal.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
