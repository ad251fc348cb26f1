"""``polyfocal train_detectron2`` in a clone."""

import sys

from polyfocal.commands.train_detectron2 import main

if __name__ == "__main__":
    sys.exit(main())
