"""``polyfocal curvature`` in a clone."""

import sys

from polyfocal.commands.curvature import main

if __name__ == "__main__":
    sys.exit(main())
