"""``polyfocal train`` in a clone."""

import sys

from polyfocal.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
