"""``polyfocal export`` in a clone."""

import sys

from polyfocal.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
