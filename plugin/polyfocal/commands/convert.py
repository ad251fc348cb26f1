"""Write a data set with YOLO's or Pascal VOC's labels, or a Roboflow export, as a COCO folder.

The format is recognised by itself. The folder that is written is what --data takes. The pictures in
it are hard links, which need no room, or copies where links are impossible. Labels are read with
supervision: pip install 'polyfocal[convert]'. docs/data.md says what becomes of each format.
"""

import argparse
from pathlib import Path

from polyfocal.data.converting import convert
from polyfocal.experiments.command_line import parser_of, run_tool

EXAMPLES = """\
examples:
  polyfocal convert data/cells_yolo data/cells        # data.yaml, images, labels
  polyfocal convert VOCdevkit/VOC2007 data/voc        # Annotations, JPEGImages, ImageSets
  polyfocal convert cells.v1i.coco data/cells         # Roboflow: train, valid, test
"""


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was found."""
    print("\n".join(convert(args.source, args.destination)))


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("convert", __doc__, EXAMPLES)
    text = "folder of the data set, or the data.yaml of one"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=text)
    text = "folder to make"
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help=text)
    return run_tool(run, parser.parse_args(argv))
