"""Average precision and recall as COCO measures them, at any number of detections per picture."""

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Group
from rich.table import Table

from polyfocal.data.annotations import Annotations, annotations_of
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.files import DatasetError
from polyfocal.tables import table

USUAL_LIMIT = 100
"""Most detections of a category in a picture that COCO counts."""


@dataclass(frozen=True)
class CocoResult:
    """What COCOeval measured, in [0, 1]; NaN if there is no ground truth of that kind.

    Attributes:
        stats: ``mAP mAP_50 mAP_75 mAP_s mAP_m mAP_l AR@1 AR@10 AR@{max_dets} AR_s AR_m AR_l``.
            Everything but AR@1 and AR@10 is at ``max_dets`` detections per picture.
        per_class: mAP by the name of the category.
        precision: The mean over the categories that have objects, at the IoU thresholds 0.5, 0.55,
            ..., 0.95 and the recalls 0, 0.01, ..., 1, (10, 101); NaN without objects.
    """

    stats: dict[str, float]
    per_class: dict[str, float]
    precision: NDArray[np.float64] = field(repr=False, compare=False)


def truth_for(
    ground_truth: str | Path | COCO | Annotations,
    kind: Kind,
    category_ids: Sequence[int] | None = None,
) -> Annotations:
    """A ground truth that can be compared with detections.

    Args:
        ground_truth: An annotation file, one loaded by pycocotools, or annotations.
        kind: Whether the boxes or the masks will be compared.
        category_ids: Categories that must be declared.

    Raises:
        DatasetError: The ground truth cannot be used.
    """
    if kind not in ("bbox", "segm"):
        raise DatasetError(f"iou_type must be 'bbox' or 'segm', got {kind!r}.")
    truth = annotations_of(ground_truth).class_by_class
    declared = {category["id"] for category in truth.categories}
    for id_ in category_ids or ():
        if id_ not in declared:
            raise DatasetError(f"category id {id_!r} is not declared in {truth.source}.")
    if kind == "segm" and truth.mask_problem:
        raise DatasetError(truth.mask_problem)
    return truth


def detection_limit(truth: Annotations) -> int:
    """How many detections per picture count: COCO's 100, or more hundreds for more objects.

    With fewer detections than objects, a perfect model would not have an average precision of 1.
    """
    return max(USUAL_LIMIT, -(-truth.max_instances // 100) * 100)


def remark_on_more(truth: Annotations, limit: int) -> str:
    """What to say where a model keeps more detections per picture than is customary."""
    return (
        f"a picture of the val split holds up to {truth.max_instances} objects: up to {limit} "
        f"detections per picture are kept and evaluated, not the customary {USUAL_LIMIT}."
    )


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


def evaluate(
    ground_truth: str | Path | COCO | Annotations,
    results: Sequence[dict[str, Any]] | str | Path | Detections,
    iou_type: Kind = "bbox",
    max_dets: int = 100,
    category_ids: Sequence[int] | None = None,
) -> CocoResult:
    """Measure average precision and recall as COCO does.

    pycocotools' own summary is right only for 100 detections per picture. Here every number is
    taken from its precision and recall tables at ``max_dets``. faster-coco-eval makes these tables
    if it is installed. Ids may be any: the libraries get new numbers for them.

    Args:
        ground_truth: An annotation file, one loaded by pycocotools (left unchanged), or
            annotations.
        results: Detections in COCO's results format, or a JSON file of them: ``image_id``,
            ``category_id``, ``score`` and ``bbox`` (x, y, width, height in pixels) or
            ``segmentation`` (RLE). May be empty.
        iou_type: Compare boxes or masks.
        max_dets: Most detections counted of a category in a picture, those of the highest score;
            at least 10.
        category_ids: Only these categories; all by default.

    Raises:
        DatasetError: The results do not fit the ground truth.
    """
    if max_dets < 10:
        raise DatasetError(f"max_dets must be 10 or more, got {max_dets!r}.")
    truth = truth_for(ground_truth, iou_type, category_ids)
    detected = Detections.of(results).checked(truth, iou_type)

    # Numbered by rank, which keeps the order of ties. For pycocotools 0 means "no match", and
    # faster-coco-eval keeps the numbers as floats.
    pictures, categories = _ranks(truth.images), _ranks(truth.categories)

    def numbered(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                **one,
                "id": number,
                "image_id": pictures[one["image_id"]],
                "category_id": categories[one["category_id"]],
            }
            for number, one in enumerate(entries, start=1)
        ]

    tables, evaluator = _evaluator()
    with contextlib.redirect_stdout(io.StringIO()):
        known, found = tables(), tables()
        known.dataset = {
            "images": [{**image, "id": pictures[image["id"]]} for image in truth.images],
            "categories": [{**one, "id": categories[one["id"]]} for one in truth.categories],
            "annotations": numbered(truth.annotations),
        }
        known.createIndex()
        if detected:
            found = known.loadRes(numbered(detected))
        else:  # which loadRes does not take
            found.dataset = {**known.dataset, "annotations": []}
            found.createIndex()
        evaluation = evaluator(known, found, iou_type)
        evaluation.params.maxDets = sorted({1, 10, max_dets})
        if category_ids is not None:
            evaluation.params.catIds = [categories[id_] for id_ in category_ids]
        evaluation.evaluate()
        evaluation.accumulate()

    # precision: IoU threshold, recall, category, area, max_dets. recall: the same without recall.
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    stats = {
        "mAP": _mean(precision[:, :, :, 0, -1]),
        "mAP_50": _mean(precision[0, :, :, 0, -1]),
        "mAP_75": _mean(precision[5, :, :, 0, -1]),
    }
    for area, letter in enumerate("sml", start=1):
        stats[f"mAP_{letter}"] = _mean(precision[:, :, :, area, -1])
    for index, limit in enumerate(evaluation.params.maxDets):
        stats[f"AR@{limit}"] = _mean(recall[:, :, 0, index])
    for area, letter in enumerate("sml", start=1):
        stats[f"AR_{letter}"] = _mean(recall[:, :, area, -1])
    names = {categories[one["id"]]: one["name"] for one in truth.categories}
    per_class = {
        names[id_]: _mean(precision[:, :, index, 0, -1])
        for index, id_ in enumerate(evaluation.params.catIds)
    }
    # -1 for a category without objects.
    known_classes = (precision[0, 0, :, 0, -1] >= 0).nonzero()[0]
    curves = precision[:, :, known_classes, 0, -1]
    mean = curves.mean(axis=2) if len(known_classes) else np.full(curves.shape[:2], np.nan)
    return CocoResult(stats, per_class, mean)


def format_table(results: dict[str, CocoResult]) -> Group:
    """Two tables for rich to print: the statistics and the mAP of each class.

    Args:
        results: The columns by name, such as ``{"bbox": ..., "segm": ...}``.
    """

    def made(title: str, columns: list[dict[str, float]]) -> Table:
        keys = dict.fromkeys(key for column in columns for key in column)
        rows: list[list[str | float]] = [
            [key, *(column.get(key, math.nan) for column in columns)] for key in keys
        ]
        return table(title, ("", *results), rows)

    return Group(
        made("COCO metrics", [result.stats for result in results.values()]),
        made("mAP by class", [result.per_class for result in results.values()]),
    )


def _ranks(entries: list[dict[str, Any]]) -> dict[int, int]:
    """Numbers from 1 in the order of the ids."""
    return {id_: rank for rank, id_ in enumerate(sorted(one["id"] for one in entries), start=1)}


def _evaluator() -> tuple[type[Any], type[Any]]:
    """The tables and the evaluation: those of faster-coco-eval if it is installed.

    Its numbers are those of pycocotools, in a fraction of the time.
    """
    try:
        from faster_coco_eval import COCO as FastTables
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return COCO, COCOeval
    return FastTables, COCOeval_faster


def _mean(values: NDArray[np.float64]) -> float:
    # COCOeval writes -1 where there is no ground truth.
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan
