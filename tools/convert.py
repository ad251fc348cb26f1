"""``polyfocal convert`` in a clone."""

import sys

from polyfocal.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
