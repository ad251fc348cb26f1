"""``polyfocal make_demo_data`` in a clone."""

import sys

from polyfocal.commands.make_demo_data import main

if __name__ == "__main__":
    sys.exit(main())
