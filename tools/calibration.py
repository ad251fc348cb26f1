"""``polyfocal calibration`` in a clone."""

import sys

from polyfocal.commands.calibration import main

if __name__ == "__main__":
    sys.exit(main())
