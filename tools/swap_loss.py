"""``polyfocal swap_loss`` in a clone."""

import sys

from polyfocal.commands.swap_loss import main

if __name__ == "__main__":
    sys.exit(main())
