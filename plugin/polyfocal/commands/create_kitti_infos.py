"""Check a folder in KITTI's layout and write MMDetection3D's info files for it.

Every file is checked. The info files (version 2) are kitti_infos_train.pkl and the like: one for
each of train, val, trainval and test that ROOT names in ImageSets. Neither a GPU nor
nuscenes-devkit is needed. polyfocal's own commands read the folder itself (--data ROOT);
MMDetection3D's tools need the info files.
"""

import argparse
from pathlib import Path

from polyfocal.data.kitti import write_infos
from polyfocal.experiments.command_line import parser_of, run_tool

LAYOUT = """\
the layout:
  ROOT/ImageSets/train.txt val.txt    names of frames, one per line
  ROOT/training/velodyne/000123.bin   points, float32: x, y, z, intensity
  ROOT/training/label_2/000123.txt    objects, 15 fields per line
  ROOT/training/calib/000123.txt      P2, R0_rect, Tr_velo_to_cam
  ROOT/training/image_2/000123.png    or .jpg; optional
  ROOT/testing                        the same without labels, for test.txt

examples:
  polyfocal create_kitti_infos data/kitti
  polyfocal create_kitti_infos data/kitti --out work_dirs/infos
"""


def run(args: argparse.Namespace) -> None:
    """Write the files, and say what is in them."""
    print("\n".join(write_infos(args.root, args.out or args.root)))


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("create_kitti_infos", __doc__, LAYOUT)
    parser.add_argument("root", type=Path, metavar="ROOT", help="the folder in KITTI's layout")
    text = "where to write the info files (default ROOT)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    return run_tool(run, parser.parse_args(argv))
