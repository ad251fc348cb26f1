"""Draw pictures of a COCO-format data set with their annotations and print its statistics.

Look at a data set before training on it: check its files, print how many objects of which size each
class has, and draw some of its pictures with boxes, masks and labels, one PNG per picture and a
contact sheet of them all. A dashed box is a crowd region.
"""

import argparse
from pathlib import Path

from rich.console import Console

from polyfocal.data.browse import draw_some, remarks, statistics
from polyfocal.data.coco import load_split
from polyfocal.experiments.command_line import parser_of, run_tool

EXAMPLES = """\
examples:
  polyfocal browse_dataset data/digit_scenes
  polyfocal browse_dataset data/coco --split val --num 30 --category "traffic light"
"""


def run(args: argparse.Namespace) -> None:
    """Check, count and draw."""
    split = load_split(args.folder, args.split)
    Console().print(statistics(split))
    print("\n".join(remarks(split)))
    out = args.out or Path("work_dirs/browse") / f"{args.folder.resolve().name}_{args.split}"
    if drawn := draw_some(split, out, args.num, args.category):
        print(f"{drawn} pictures and contact_sheet.png are in {out}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    parser = parser_of("browse_dataset", __doc__, EXAMPLES)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="the data set")
    add("--split", default="train", help="which split (default train)")
    text = "where to write the pictures (default work_dirs/browse/FOLDER_SPLIT)"
    add("--out", type=Path, metavar="DIR", help=text)
    text = "pictures to draw, 0 for none (default 16)"
    add("--num", type=int, default=16, metavar="N", help=text)
    add("--category", metavar="NAME", help="only pictures and objects of this class")
    return run_tool(run, parser.parse_args(argv))
