"""``polyfocal plot_loss`` in a clone."""

import sys

from polyfocal.commands.plot_loss import main

if __name__ == "__main__":
    sys.exit(main())
