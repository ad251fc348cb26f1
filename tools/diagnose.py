"""``polyfocal diagnose`` in a clone."""

import sys

from polyfocal.commands.diagnose import main

if __name__ == "__main__":
    sys.exit(main())
