"""Measure how far a detector's scores can be trusted, and calibrate them.

D-ECE, LaECE, LaECE_0, LaACE_0, LRP and optimal LRP are printed beside average precision.
RESULTS.json is in COCO's results format, whoever made it; polyfocal test --out makes one.
docs/calibration.md says what the numbers mean.

With --fit, a calibrator is fitted to these detections and kept; with --apply, a kept one is applied
to them, and the table shows before and after. Fit on one split and apply to another: a calibrator
always looks good on what it was fitted to.
"""

import argparse

from polyfocal.calibration.posthoc import METHODS, TARGETS
from polyfocal.calibration.results import calibrate
from polyfocal.experiments.command_line import parser_of, run_tool

EXAMPLES = """\
examples:
  # the numbers, and reliability diagrams in ./diagrams
  polyfocal calibration results.bbox.json annotations/val.json --diagrams diagrams

  # fitted on val, applied to test, the new detections written
  polyfocal calibration val.bbox.json annotations/val.json --fit isotonic \\
      --save work_dirs/run/calibrator.json
  polyfocal calibration test.bbox.json annotations/test.json \\
      --apply work_dirs/run/calibrator.json --out calibrated.json

  # a score threshold per class, for polyfocal test --thresholds and for programs
  polyfocal calibration val.bbox.json annotations/val.json --thresholds thresholds.json
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("calibration", __doc__, EXAMPLES)
    add = parser.add_argument
    add("results", metavar="RESULTS.json", help="detections, COCO's results format")
    add("truth", metavar="ANNOTATIONS.json", help="COCO's ground truth")
    add("--masks", action="store_true", help="compare masks instead of boxes")
    text = "IoU from which a detection counts as correct in D-ECE and LRP (default 0.5)"
    add("--iou", type=float, default=0.5, help=text)
    text = (
        "most detections per class and picture that count (default 100, or more hundreds if a "
        "picture holds more objects)"
    )
    add("--max-dets", type=int, metavar="N", help=text)
    text = "write the score thresholds of the classes to FILE, those of the largest F1 at --iou"
    add("--thresholds", metavar="FILE", help=text)
    add("--diagrams", metavar="DIR", help="draw reliability diagrams into DIR")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--fit", choices=METHODS, help="fit a calibrator to the detections")
    way.add_argument("--apply", metavar="FILE", help="apply a calibrator that --save wrote")
    text = (
        "with --fit, what scores should mean: iou (for LaECE, the default) or precision (for D-ECE)"
    )
    add("--target", choices=TARGETS, help=text)
    add("--shared", action="store_true", help="with --fit, one map for all classes")
    add("--save", metavar="FILE", help="with --fit, the file for the calibrator")
    add("--out", metavar="FILE", help="with --apply, the file for the new results")
    args = parser.parse_args(argv)
    if bool(args.fit) != bool(args.save):
        parser.error("--fit METHOD and --save FILE are given together")
    if not args.fit and (args.target or args.shared):
        parser.error("--target and --shared go with --fit METHOD")
    args.target = args.target or "iou"
    if args.out and not args.apply:
        parser.error("--out takes the results of --apply FILE")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(lambda args: calibrate(**vars(args)), parse_args(argv))
