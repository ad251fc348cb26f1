"""Compare finished trainings of polyfocal train in one HTML file.

The report holds the numbers of the last evaluations, average precision by class, calibration, the
curves of training, precision against recall, time and memory, which settings differ, and the
pictures on which the runs differ most. It loads no other file: mail it, or open it from a
disk. All runs must have been evaluated on the same data.

What needs the detections is taken from WORK_DIR/val.bbox.json (and val.segm.json), which
polyfocal train leaves there; polyfocal test CONFIG CHECKPOINT --out WORK_DIR/val.json writes them
for a run that has none.
"""

import argparse

from rich.console import Console

from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import parser_of, run_tool
from polyfocal.experiments.comparing import compare, report, results_table
from polyfocal.mmengine.work_dir import read_trained_run

EXAMPLES = """\
examples:
  # two losses on the built-in pictures
  polyfocal train retinanet_focal --demo
  polyfocal train retinanet_poly1 --demo
  polyfocal compare work_dirs/retinanet_focal work_dirs/retinanet_poly1 --out report.html

  # all seeds of a study of polyfocal reproduce, with more pictures
  polyfocal compare work_dirs/reproduce/polyloss_coco/*/seed_*/run --pictures 20
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("compare", __doc__, EXAMPLES)
    parser.add_argument(
        "work_dirs", nargs="+", metavar="WORK_DIR", help="work directories of finished trainings"
    )
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="the report (default: report.html)"
    )
    text = "number of pictures to show, those on which the runs differ most (default: 6)"
    parser.add_argument("--pictures", type=int, default=6, metavar="N", help=text)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Write the report, and show the results."""
    if args.pictures < 0:
        raise UserError(f"--pictures takes 0 or more, got {args.pictures}.")
    comparison = compare(args.work_dirs, read_trained_run)
    text = report(comparison, args.pictures)
    write_text(args.out, text)
    Console().print(results_table(comparison).console())
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"report {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))
