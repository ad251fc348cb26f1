"""``polyfocal create_kitti_infos`` in a clone."""

import sys

from polyfocal.commands.create_kitti_infos import main

if __name__ == "__main__":
    sys.exit(main())
