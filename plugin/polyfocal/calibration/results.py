"""A file of detections measured, and measured again with other scores."""

import json

from rich.console import Console

from polyfocal.calibration import posthoc
from polyfocal.calibration.detection import LAECE_IOU, DetectionResult, match, measure
from polyfocal.calibration.diagram import save_diagrams
from polyfocal.calibration.posthoc import Calibrator, Method, Target
from polyfocal.calibration.thresholds import best_f1, points_table
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.evaluation import (
    CocoResult,
    detection_limit,
    format_table,
    remark_on_limit,
    truth_for,
)
from polyfocal.data.files import write_text
from polyfocal.errors import UserError


def calibrate(
    results: str,
    truth: str,
    *,
    masks: bool = False,
    iou: float = 0.5,
    max_dets: int | None = None,
    diagrams: str | None = None,
    fit: Method | None = None,
    target: Target = "iou",
    shared: bool = False,
    save: str | None = None,
    apply: str | None = None,
    out: str | None = None,
    thresholds: str | None = None,
) -> None:
    """Print the calibration of detections, before and after a calibrator where there is one.

    Args:
        results: COCO results, a file.
        truth: COCO annotations, a file.
        masks: Compare masks instead of boxes.
        iou: From which on a detection is right for D-ECE and LRP.
        max_dets: Most detections of a class in a picture that count; None for what is customary.
        diagrams: Folder for reliability diagrams.
        fit, target, shared: See :func:`polyfocal.calibration.posthoc.fit`; a calibrator that is
            fitted goes to the file ``save``.
        save: See ``fit``.
        apply: File of a calibrator to apply instead.
        out: File for the results with the new scores.
        thresholds: File for the score thresholds of the classes, those of the largest F1 at
            ``iou``, of the scores as they are last.

    Raises:
        UserError: A file is not usable or cannot be written, or nothing can be fitted.
    """
    kind: Kind = "segm" if masks else "bbox"
    against, found = truth_for(truth, kind), Detections.of(results)
    limit = detection_limit(against) if max_dets is None else max_dets
    before = measure(against, found, kind, limit, iou=iou)
    columns: dict[str, tuple[CocoResult, DetectionResult]] = {kind: before}
    calibrator = None
    if fit is not None:
        try:
            matched = match(against, found, [LAECE_IOU, iou], kind, limit)
            calibrator = posthoc.fit(matched, fit, target, iou, not shared)
        except UserError as error:
            raise UserError(f"{results} for {truth}: {error}") from None
    elif apply is not None:
        calibrator = Calibrator.load(apply)
    calibrated = found if calibrator is None else calibrator.apply_to(found, against)
    if calibrator is not None:
        after = measure(against, calibrated, kind, limit, iou=iou)
        columns = {"before": before, "after" if fit is None else "fitted to": after}
    *_, (_, calibration) = columns.values()
    Console().print(format_table({name: coco for name, (coco, _) in columns.items()}))
    Console().print(calibration.table())
    chosen = None
    if thresholds is not None:
        try:
            chosen, at = best_f1(match(against, calibrated, [iou], kind, limit), iou)
        except UserError as error:
            raise UserError(f"{results} for {truth}: {error}") from None
        Console().print(points_table(at, iou))
    notes = [*against.notes, "" if max_dets is not None else remark_on_limit(against, found, limit)]
    print("".join(f"note: {note}\n" for note in notes if note), end="")
    if calibrator is not None and save is not None:
        calibrator.save(save)
        print(f"calibrator {save}")
    if chosen is not None and thresholds is not None:
        chosen.save(thresholds)
        print(f"thresholds {thresholds}")
    if out is not None:
        write_text(out, json.dumps(calibrated.entries))
        print(f"results    {out}")
    for file in save_diagrams(calibration, diagrams) if diagrams is not None else ():
        print(f"diagram    {file}")
