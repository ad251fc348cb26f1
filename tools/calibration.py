#!/usr/bin/env python
"""Measure how far a detector's scores can be trusted, and calibrate them."""

import argparse
import json
import math
import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyfocal.calibration import DetectionCalibration, DetectionResult, match
from polyfocal.calibration.detection import LAECE_IOU
from polyfocal.calibration.diagram import save_diagrams
from polyfocal.calibration.posthoc import METHODS, TARGETS, Calibrator, fit
from polyfocal.data.annotations import Annotations
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.evaluation import (
    USUAL_LIMIT,
    CocoResult,
    detection_limit,
    evaluate,
    format_table,
    truth_for,
)
from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import run_tool

DESCRIPTION = """\
Print the calibration of detections beside their average precision: D-ECE, LaECE, LaECE_0,
LaACE_0, LRP and optimal LRP. RESULTS.json is in COCO's results format, whoever made it;
tools/test.py --out makes one. docs/calibration.md says what the numbers mean.

With --fit, a calibrator is fitted to these detections and kept; with --apply, a kept one is applied
to them, and the table shows before and after. Fit on one split and apply to another: a calibrator
always looks good on what it was fitted to."""

EPILOG = """\
examples:
  # the numbers, and reliability diagrams in ./diagrams
  python tools/calibration.py results.bbox.json annotations/val.json --diagrams diagrams

  # fitted on val, applied to test, the new detections written
  python tools/calibration.py val.bbox.json annotations/val.json --fit isotonic \\
      --save work_dirs/run/calibrator.json
  python tools/calibration.py test.bbox.json annotations/test.json \\
      --apply work_dirs/run/calibrator.json --out calibrated.json
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="RESULTS.json", help="detections, COCO's results format")
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="COCO's ground truth")
    parser.add_argument("--masks", action="store_true", help="compare masks instead of boxes")
    parser.add_argument(
        "--iou", type=float, default=0.5, help="IoU that D-ECE and LRP ask for (default 0.5)"
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="most detections of a class in a picture that count (default 100, or more hundreds "
        "where a picture holds more objects)",
    )
    parser.add_argument("--diagrams", metavar="DIR", help="draw reliability diagrams into DIR")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--fit", choices=METHODS, help="fit a calibrator to the detections")
    way.add_argument("--apply", metavar="FILE", help="apply a calibrator that --save wrote")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default="iou",
        help="with --fit, what scores are to say: iou (for LaECE) or precision (for D-ECE)",
    )
    parser.add_argument("--shared", action="store_true", help="with --fit, one map for all classes")
    parser.add_argument("--save", metavar="FILE", help="with --fit, where the calibrator goes")
    parser.add_argument("--out", metavar="FILE", help="with --apply, where the new results go")
    args = parser.parse_args(argv)
    if bool(args.fit) != bool(args.save):
        parser.error("--fit METHOD and --save FILE are given together")
    if args.out and not args.apply:
        parser.error("--out takes the results of --apply FILE")
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, fit or apply."""
    kind: Kind = "segm" if args.masks else "bbox"
    truth, results = truth_for(args.annotations, kind), Detections.of(args.results)
    max_dets = detection_limit(truth) if args.max_dets is None else args.max_dets

    def measure(detections: Detections) -> tuple[CocoResult, DetectionResult]:
        metric = DetectionCalibration(args.iou)
        metric.update(truth, detections, kind, max_dets)
        return evaluate(truth, detections, kind, max_dets), metric.compute()

    before = measure(results)
    columns: dict[str, tuple[CocoResult, DetectionResult]] = {kind: before}
    calibrator = None
    if args.fit:
        matched = match(truth, results, [LAECE_IOU, args.iou], kind, max_dets)
        try:
            calibrator = fit(matched, args.fit, args.target, args.iou, not args.shared)
        except UserError as error:
            raise UserError(f"{args.results} for {args.annotations}: {error}") from None
    elif args.apply:
        calibrator = Calibrator.load(args.apply)
    if calibrator is not None:
        calibrated = apply(calibrator, truth, results)
        after = "fitted to" if args.fit else "after"
        columns = {"before": before, after: measure(calibrated)}
    console = Console()
    console.print(
        format_table(
            {
                name: replace(result, stats={**result.stats, **calibration.stats})
                for name, (result, calibration) in columns.items()
            }
        )
    )
    *_, (_, calibration) = columns.values()
    console.print(class_table(calibration))
    notes = [*truth.notes]
    if args.max_dets is None:
        notes.append(remark_on_limit(truth, results, max_dets))
    for note in filter(None, notes):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if args.fit and calibrator is not None:
        calibrator.save(args.save)
        console.print(f"calibrator {args.save}", highlight=False, soft_wrap=True)
    if args.out:
        write_text(args.out, json.dumps(calibrated.entries))
        console.print(f"results    {args.out}", highlight=False, soft_wrap=True)
    if args.diagrams is not None:
        for file in save_diagrams(calibration, args.diagrams):
            console.print(f"diagram    {file}", highlight=False, soft_wrap=True)


def remark_on_limit(truth: Annotations, results: Detections, max_dets: int) -> str:
    """What to say about detections that do not count, or count against custom; else empty."""
    if max_dets > USUAL_LIMIT:
        return (
            f"a picture holds up to {truth.max_instances} objects: up to {max_dets} detections of "
            f"a class in a picture count, not the customary {USUAL_LIMIT}."
        )
    most = results.most_in_a_picture
    if most > max_dets:
        return (
            f"a picture has up to {most} detections of a class: the best {max_dets} count, as is "
            f"customary; --max-dets {most} counts them all."
        )
    return ""


def apply(calibrator: Calibrator, truth: Annotations, results: Detections) -> Detections:
    """Measured detections with new scores, and everything else that they had."""
    names = {category["id"]: category["name"] for category in truth.categories}
    scores = calibrator.apply(
        [one["score"] for one in results.entries],
        [names[one["category_id"]] for one in results.entries],
    )
    entries = [
        {**one, "score": float(score)} for one, score in zip(results.entries, scores, strict=True)
    ]
    return Detections(results.source, entries)


def class_table(calibration: DetectionResult) -> Table:
    """The calibration of each class, and the score from which on its oLRP counts."""
    table = Table(title="Calibration by class")
    table.add_column("")
    for name in ("objects", "detected", "LaECE", "LaACE_0", "LRP", "oLRP", "score"):
        table.add_column(name, justify="right")
    for name, one in calibration.classes.items():
        numbers = (one.la_ece, one.la_ace_0, one.lrp, one.olrp, one.threshold)
        table.add_row(
            Text(name),
            str(one.num_objects),
            str(one.num_detections),
            *("-" if math.isnan(number) else f"{number:.3f}" for number in numbers),
        )
    return table


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv), goes_on_with=None)


if __name__ == "__main__":
    sys.exit(main())
