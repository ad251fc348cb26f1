"""Say how certain an average precision is, and which mistakes cost it.

AP of the results with bootstrap intervals over the pictures, in all and per class; with --against
the difference to another run on the same pictures. Then the mistakes by TIDE's types, and the AP
that each type costs. RESULTS.json is in COCO's results format: polyfocal test --out makes one, and
a training leaves val.bbox.json in its work directory. docs/diagnose.md says what the numbers mean.
"""

import argparse
from typing import Any

from rich.console import Console

from polyfocal.calibration.tide import mistakes, mistakes_table
from polyfocal.data.annotations import read_annotations
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.evaluation import detection_limit
from polyfocal.experiments.command_line import parser_of, run_tool, seed
from polyfocal.experiments.intervals import ap_intervals, intervals_table

EXAMPLES = """\
examples:
  # one run
  polyfocal diagnose annotations/val.json work_dirs/poly1/val.bbox.json

  # two runs of three seeds each, on the same pictures
  polyfocal diagnose annotations/val.json poly1_*/val.bbox.json \\
      --against focal_*/val.bbox.json
"""


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    kind: Kind = "segm" if args.masks else "bbox"
    truth = read_annotations(args.annotations, pictures=False)
    results = [Detections.of(file) for file in args.results]
    against = [Detections.of(file) for file in args.against]
    settings: dict[str, Any] = {"kind": kind, "max_dets": detection_limit(truth)}
    draws: dict[str, Any] = {"draws": args.draws, "level": args.level / 100, "seed": args.seed}
    console = Console()
    console.print(intervals_table(ap_intervals(truth, results, **settings, **draws)))
    if against:
        console.print(intervals_table(ap_intervals(truth, against, **settings, **draws)))
        found = ap_intervals(truth, results, against, **settings, **draws)
        console.print(intervals_table(found, difference=True))
    for one in [*results, *against]:
        console.print(one.source, highlight=False, markup=False, soft_wrap=True)
        console.print(mistakes_table(mistakes(truth, one, **settings)))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of("diagnose", __doc__, EXAMPLES)
    add = parser.add_argument
    add("annotations", metavar="ANNOTATIONS.json", help="COCO's ground truth")
    text = "detections of a run, or several of them, one per seed"
    add("results", nargs="+", metavar="RESULTS.json", help=text)
    text = "detections of another run, with the same seeds in the same order"
    add("--against", nargs="+", default=[], metavar="RESULTS.json", help=text)
    add("--masks", action="store_true", help="compare masks instead of boxes")
    add("--draws", type=int, default=1000, help="number of draws of the pictures (default 1000)")
    text = "how often the intervals hold the truth, in per cent (default 95)"
    add("--level", type=float, default=95.0, help=text)
    add("--seed", type=seed, default=0, help="seed of the draws (default 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))
