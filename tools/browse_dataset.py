"""``polyfocal browse_dataset`` in a clone."""

import sys

from polyfocal.commands.browse_dataset import main

if __name__ == "__main__":
    sys.exit(main())
