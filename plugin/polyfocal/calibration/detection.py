"""Calibration of a detector's scores, from COCO results and ground truth.

:func:`match` decides once per IoU threshold which detections are right, exactly as COCOeval does.
:class:`DetectionCalibration` measures from that how far the scores can be trusted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rich.table import Table

from polyfocal.calibration.classification import (
    Bins,
    Floats,
    Integers,
    bin_numbers,
    check_num_bins,
    equal_width_bins,
)
from polyfocal.data.annotations import Annotations
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.evaluation import CocoResult, evaluate, truth_for
from polyfocal.data.masks import run_lengths
from polyfocal.errors import UserError
from polyfocal.tables import table

Booleans = NDArray[np.bool_]

LAECE_IOU = 0.1
"""IoU from which LaECE counts a detection as right (Oksuz et al. 2023)."""


@dataclass(frozen=True)
class Matches:
    """Which of N detections are right at one IoU threshold.

    Attributes:
        iou: IoU with the object that was found, 0 if none was, (N,).
        ignored: True for a detection that found no object but lies in a crowd region: it counts as
            neither right nor wrong, (N,).
        object_: Which annotation of the ground truth was found, -1 if none was, (N,); empty if
            several ground truths were put together.
    """

    iou: Floats
    ignored: Booleans
    object_: Integers = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def right(self) -> Booleans:
        """True where an object was found, (N,)."""
        return self.iou > 0


@dataclass(frozen=True)
class MatchedDetections:
    """The detections that count, class by class, and what they found.

    Attributes:
        names: Names of the C categories.
        num_objects: Objects of each category that can be found, without crowd regions, (C,).
        index: Place of each of the N detections in the results, (N,).
        score: (N,) in [0, 1].
        label: Index of its category in ``names``, (N,).
        box: Centre x, centre y, width and height in parts of the picture's, in [0, 1], (N, 4).
        matches: What was found, by IoU threshold.
    """

    names: tuple[str, ...]
    num_objects: Integers
    index: Integers
    score: Floats
    label: Integers
    box: Floats
    matches: dict[float, Matches]


@dataclass(frozen=True)
class ClassCalibration:
    """Calibration of the detections of one category; NaN without objects or detections.

    LRP is 1 if there are objects and no detections.

    Attributes:
        num_objects: Objects that can be found.
        num_detections: Detections without those that are ignored at LaECE's threshold.
        la_ece: LaECE; see :class:`DetectionResult` for this and the next numbers.
        la_ece_0: LaECE_0.
        la_ace_0: LaACE_0.
        lrp: LRP.
        olrp: Optimal LRP.
        threshold: The score from which on detections are kept for ``olrp``; NaN if the least
            error is reached without any detection.
        bins: The reliability diagram of ``la_ece``.
    """

    num_objects: int
    num_detections: int
    la_ece: float
    la_ece_0: float
    la_ace_0: float
    lrp: float
    olrp: float
    threshold: float
    bins: Bins


@dataclass(frozen=True)
class DetectionResult:
    """Calibration of a detector, all in [0, 1]; NaN if there is nothing to measure.

    Attributes:
        d_ece: Expected error of the score as the probability that the detection is right, over all
            detections together (Kueppers et al. 2020).
        d_ece_box: The same, in bins of the score and of the box's centre, width and height.
        la_ece: Mean over the categories of the expected error of the score as IoU times precision,
            right being IoU >= 0.1 (Oksuz et al. 2023).
        la_ece_0: The same, with any overlap counted as right (Kuzucu et al. 2024).
        la_ace_0: Mean over the categories of mean |IoU - score|, right being any overlap.
        lrp: Localisation recall precision error of all detections, mean over the categories
            (Oksuz et al. 2018).
        olrp: The same for the detections above the best threshold of each category.
        bins: The reliability diagram of ``d_ece``.
        classes: Each category by its name.
    """

    d_ece: float
    d_ece_box: float
    la_ece: float
    la_ece_0: float
    la_ace_0: float
    lrp: float
    olrp: float
    bins: Bins
    classes: dict[str, ClassCalibration]

    @property
    def stats(self) -> dict[str, float]:
        """The numbers by their names in the literature, for a table."""
        return {
            "D-ECE": self.d_ece,
            "D-ECE_box": self.d_ece_box,
            "LaECE": self.la_ece,
            "LaECE_0": self.la_ece_0,
            "LaACE_0": self.la_ace_0,
            "LRP": self.lrp,
            "oLRP": self.olrp,
        }

    def table(self) -> Table:
        """The calibration of each class, and the score from which on its oLRP counts."""
        numbers = ("la_ece", "la_ace_0", "lrp", "olrp", "threshold")
        rows = [
            [name, str(one.num_objects), str(one.num_detections)]
            + [getattr(one, number) for number in numbers]
            for name, one in self.classes.items()
        ]
        header = ("", "objects", "detected", "LaECE", "LaACE_0", "LRP", "oLRP", "score")
        return table("Calibration by class", header, rows)


class DetectionCalibration:
    """Collects detections and ground truth, and measures the calibration of the scores.

    Args:
        iou: IoU from which on a detection is right for D-ECE and LRP, in (0, 1).
        num_bins: Bins of D-ECE.
        num_box_bins: Bins of the score and of each side of the box in ``d_ece_box``: that number
            to the fifth power in all.
        num_class_bins: Bins of LaECE and LaECE_0 in each category.

    Example:
        >>> metric = DetectionCalibration()
        >>> metric.update("annotations/val.json", "results.bbox.json")  # doctest: +SKIP
        >>> metric.compute().la_ece  # doctest: +SKIP
    """

    def __init__(
        self,
        iou: float = 0.5,
        num_bins: int = 10,
        num_box_bins: int = 5,
        num_class_bins: int = 25,
    ) -> None:
        if not 0 < iou < 1:
            raise UserError(f"iou must be between 0 and 1, got {iou!r}.")
        self.iou = float(iou)
        self.num_bins = check_num_bins(num_bins)
        self.num_box_bins = check_num_bins(num_box_bins)
        self.num_class_bins = check_num_bins(num_class_bins)
        self._parts: list[MatchedDetections] = []

    def update(
        self,
        ground_truth: str | Path | COCO | Annotations,
        results: Sequence[dict[str, Any]] | str | Path | Detections,
        iou_type: Kind = "bbox",
        max_dets: int = 100,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        """Add the pictures of a ground truth, whether or not something was detected in them.

        The arguments are those of :func:`polyfocal.coco.evaluate`.

        Raises:
            UserError: The results do not fit, a score is not in [0, 1], or the categories differ
                from those of earlier pictures.
        """
        thresholds = {self.iou, LAECE_IOU, 0.0}
        self.add(match(ground_truth, results, sorted(thresholds), iou_type, max_dets, category_ids))

    def add(self, matched: MatchedDetections) -> None:
        """Add the pictures of :func:`match`, with ``iou``, 0.1 and 0 among its thresholds.

        Raises:
            UserError: The categories differ from those of earlier pictures.
        """
        if self._parts and matched.names != self._parts[0].names:
            raise UserError(
                f"the categories are {list(matched.names)}; those before were "
                f"{list(self._parts[0].names)}."
            )
        self._parts.append(matched)

    def merge(self, other: "DetectionCalibration") -> None:
        """Add the pictures that another process or part collected, with the same ``iou``."""
        if other.iou != self.iou:
            raise UserError(
                f"this was measured at IoU {self.iou} and the other at {other.iou}: they must be "
                "the same."
            )
        for part in other._parts:
            self.add(part)

    def compute(self) -> DetectionResult:
        """Measure all pictures so far."""
        if not self._parts:
            raise UserError("there are no pictures yet: call update() before compute().")
        whole = _joined(self._parts)
        at_iou = whole.matches[self.iou]
        counted = ~at_iou.ignored
        score, right = whole.score[counted], at_iou.right[counted].astype(np.float64)
        bins = equal_width_bins(score, right, self.num_bins)
        classes = self._classes(whole)
        measured = [one for one in classes.values() if one.num_objects]
        return DetectionResult(
            d_ece=bins.expected_error,
            d_ece_box=_error_in_cells(score, whole.box[counted], right, self.num_box_bins),
            la_ece=_mean([one.la_ece for one in measured]),
            la_ece_0=_mean([one.la_ece_0 for one in measured]),
            la_ace_0=_mean([one.la_ace_0 for one in measured]),
            lrp=_mean([one.lrp for one in measured]),
            olrp=_mean([one.olrp for one in measured]),
            bins=bins,
            classes=classes,
        )

    def _classes(self, whole: MatchedDetections) -> dict[str, ClassCalibration]:
        order = np.argsort(whole.label, kind="stable")
        borders = np.searchsorted(whole.label[order], np.arange(len(whole.names) + 1))
        return {
            name: self._class(whole, order[borders[c] : borders[c + 1]], whole.num_objects[c])
            for c, name in enumerate(whole.names)
        }

    def _class(
        self, whole: MatchedDetections, rows: Integers, num_objects: int
    ) -> ClassCalibration:
        def counted(threshold: float) -> tuple[Floats, Floats]:
            matches = whole.matches[threshold]
            kept = rows[~matches.ignored[rows]]
            return whole.score[kept], matches.iou[kept]

        def bins(threshold: float) -> Bins:
            return equal_width_bins(*counted(threshold), self.num_class_bins, closed="right")

        diagram = bins(LAECE_IOU)
        score, iou = counted(0.0)
        lrp, olrp, threshold = _lrp(*counted(self.iou), int(num_objects), self.iou)
        some = bool(num_objects)
        return ClassCalibration(
            num_objects=int(num_objects),
            num_detections=int(diagram.count.sum()),
            la_ece=diagram.expected_error if some else np.nan,
            la_ece_0=bins(0.0).expected_error if some else np.nan,
            la_ace_0=float(np.abs(iou - score).mean()) if some and score.size else np.nan,
            lrp=lrp,
            olrp=olrp,
            threshold=threshold,
            bins=diagram,
        )


def measure(
    ground_truth: COCO | Annotations | str | Path,
    results: Sequence[dict[str, Any]] | str | Path | Detections,
    kind: Kind = "bbox",
    max_dets: int = 100,
    category_ids: Sequence[int] | None = None,
    *,
    iou: float = 0.5,
) -> tuple[CocoResult, DetectionResult]:
    """Average precision and recall, and calibration.

    The arguments are those of :func:`polyfocal.coco.evaluate`, and ``iou`` that of
    :class:`DetectionCalibration`.

    Returns:
        What COCO measures with the numbers of calibration added to its ``stats``, and everything
        of calibration.

    Raises:
        UserError: The results do not fit, or a score is not in [0, 1].
    """
    result = evaluate(ground_truth, results, kind, max_dets, category_ids)
    metric = DetectionCalibration(iou)
    metric.update(ground_truth, results, kind, max_dets, category_ids)
    calibration = metric.compute()
    return replace(result, stats={**result.stats, **calibration.stats}), calibration


def match(
    ground_truth: str | Path | COCO | Annotations,
    results: Sequence[dict[str, Any]] | str | Path | Detections,
    iou_thresholds: Sequence[float],
    iou_type: Kind = "bbox",
    max_dets: int = 100,
    category_ids: Sequence[int] | None = None,
) -> MatchedDetections:
    """Decide which detections are right, as COCOeval does.

    In each picture and category the detections choose by descending score, each the object of the
    largest IoU that is still free, if that is at least the threshold; at the threshold 0, more
    than 0. Among equal scores the first detection chooses first; among equal IoUs the last object
    is taken. A detection that finds no object, and lies in a crowd region by at least the
    threshold, is ignored.

    Args:
        ground_truth: This and the others are as in :func:`polyfocal.coco.evaluate`.
        results: Detections; scores in [0, 1].
        iou_thresholds: Each in [0, 1].
        iou_type: Compare boxes or masks.
        max_dets: Most detections counted of a category in a picture, those of the highest score.
        category_ids: Only these categories; all by default.

    Raises:
        DatasetError: The results do not fit the ground truth.
    """
    content = truth_for(ground_truth, iou_type, category_ids)
    detections = Detections.of(results).checked(content, iou_type, probabilities=True)
    names = {
        category["id"]: category["name"]
        for category in content.categories
        if category_ids is None or category["id"] in category_ids
    }
    labels = {id_: label for label, id_ in enumerate(names)}
    pictures = {picture["id"]: row for row, picture in enumerate(content.images)}
    sides = np.array(
        [(picture["width"], picture["height"]) for picture in content.images], dtype=np.float64
    ).reshape(-1, 2)

    def keys(entries: list[dict[str, Any]]) -> Integers:
        """A number per picture and category; -1 if the category does not count."""
        return np.array(
            [
                pictures[entry["image_id"]] * len(labels) + labels[entry["category_id"]]
                if entry["category_id"] in labels
                else -1
                for entry in entries
            ],
            dtype=np.int64,
        )

    score = np.clip([float(detection["score"]) for detection in detections], 0.0, 1.0)
    key = keys(detections)
    index = np.lexsort((-score, key))  # stable: the first of equal scores comes first
    index = index[key[index] >= 0]
    rank = np.arange(len(index)) - np.searchsorted(key[index], key[index])
    index, rank = index[rank < max_dets], rank[rank < max_dets]
    key, score = key[index], score[index]

    objects = content.annotations
    object_key = keys(objects)
    order = np.argsort(object_key, kind="stable")
    order = order[object_key[order] >= 0]
    object_key = object_key[order]
    crowd = np.array([objects[row]["iscrowd"] for row in order], dtype=bool)
    label = key % len(labels)
    num_objects = np.bincount(object_key[~crowd] % len(labels), minlength=len(labels))

    # Every detection with every object of its picture and category.
    first = np.searchsorted(object_key, key, side="left")
    count = np.searchsorted(object_key, key, side="right") - first
    pair_d = np.repeat(np.arange(len(index)), count)
    pair_g = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    if iou_type == "bbox":
        boxes = _boxes([detection["bbox"] for detection in detections])[index]
        iou = _box_iou(
            boxes[pair_d], _boxes([objects[row]["bbox"] for row in order])[pair_g], crowd[pair_g]
        )
    else:
        masks = [detections[row]["segmentation"] for row in index]
        boxes = _boxes(coco_mask.toBbox(masks) if masks else [])
        truth = [
            run_lengths(objects[row]["segmentation"], content.sizes[objects[row]["image_id"]])
            for row in order
        ]
        iou = _mask_iou(masks, truth, crowd, key, first, count)

    side = sides[key // len(labels)]
    box = np.hstack([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]]) / np.hstack([side, side])
    # Sorted so that in each round the best object of a detection, the last of equals, comes last.
    some = np.flatnonzero(iou > 0)
    some = some[np.lexsort((pair_g[some], iou[some], pair_d[some], rank[pair_d[some]]))]
    pairs = _Pairs(pair_d[some], pair_g[some], iou[some], rank[pair_d[some]], crowd[pair_g[some]])
    return MatchedDetections(
        names=tuple(names.values()),
        num_objects=num_objects,
        index=index,
        score=score,
        label=label,
        box=np.clip(box, 0.0, 1.0),
        matches={
            float(threshold): _choose(pairs, len(index), order, threshold)
            for threshold in iou_thresholds
        },
    )


def every_overlap(
    truth: Annotations, detections: Sequence[dict[str, Any]], iou_type: Kind
) -> tuple[Integers, Integers, Floats]:
    """The IoU of detections with all objects of their pictures, of any category, crowds left out.

    Args:
        truth: The ground truth.
        detections: Checked against it.
        iou_type: Compare boxes or masks.

    Returns:
        Of each pair that overlaps the detection's number, the object's in ``truth.objects``, and
        the IoU.
    """
    objects = truth.objects
    pictures = {picture["id"]: row for row, picture in enumerate(truth.images)}
    own = np.array([pictures[one["image_id"]] for one in detections], dtype=np.int64)
    place = np.array([pictures[one["image_id"]] for one in objects], dtype=np.int64)
    order = np.argsort(place, kind="stable")
    first = np.searchsorted(place[order], own, side="left")
    count = np.searchsorted(place[order], own, side="right") - first
    pair_d = np.repeat(np.arange(len(own)), count)
    pair_g = order[np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)]
    no_crowd = np.zeros(len(pair_g), dtype=bool)
    if iou_type == "bbox":
        boxes = _boxes([one["bbox"] for one in detections])
        iou = _box_iou(boxes[pair_d], _boxes([one["bbox"] for one in objects])[pair_g], no_crowd)
    else:
        masks = [one["segmentation"] for one in detections]
        whole = [run_lengths(one["segmentation"], truth.sizes[one["image_id"]]) for one in objects]
        pairs = zip(pair_d.tolist(), pair_g.tolist(), strict=True)
        found = [coco_mask.iou([masks[d]], [whole[g]], [0])[0, 0] for d, g in pairs]
        iou = np.array(found, dtype=np.float64)
    some = iou > 0
    return pair_d[some], pair_g[some], iou[some]


@dataclass(frozen=True)
class _Pairs:
    """Detections and objects that overlap, in the order in which detections choose."""

    detection: Integers
    object_: Integers
    iou: Floats
    rank: Integers
    crowd: Booleans


def _choose(pairs: _Pairs, num_detections: int, annotation: Integers, threshold: float) -> Matches:
    close = pairs.iou >= min(threshold, 1 - 1e-10)  # COCOeval's own tolerance
    kept = close & ~pairs.crowd
    detection, object_, iou = pairs.detection[kept], pairs.object_[kept], pairs.iou[kept]
    rank = pairs.rank[kept]
    found = np.zeros(num_detections)
    which = np.full(num_detections, -1, dtype=np.int64)
    free = np.ones(len(annotation), dtype=bool)
    # Detections of one rank are in different groups, so they cannot choose the same object.
    for start, end in _runs(rank):
        open_ = start + np.flatnonzero(free[object_[start:end]])
        best = open_[np.diff(detection[open_], append=-1) != 0]
        found[detection[best]] = np.minimum(iou[best], 1)  # equal boxes may be above by rounding
        which[detection[best]] = annotation[object_[best]]
        free[object_[best]] = False
    ignored = np.zeros(num_detections, dtype=bool)
    ignored[pairs.detection[close & pairs.crowd]] = True
    return Matches(found, ignored & (found == 0), which)


def _runs(values: Integers) -> Iterator[tuple[int, int]]:
    """Where runs of equal values of 0 or more begin and end."""
    borders = np.flatnonzero(np.diff(values, prepend=-1, append=-1)).tolist()
    return pairwise(borders)


def _boxes(boxes: Any) -> Floats:
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _box_iou(detection: Floats, object_: Floats, crowd: Booleans) -> Floats:
    """IoU of pairs of boxes x, y, w, h; with a crowd region the covered part of the detection."""
    low = np.maximum(detection[:, :2], object_[:, :2])
    high = np.minimum(detection[:, :2] + detection[:, 2:], object_[:, :2] + object_[:, 2:])
    overlap = np.maximum(high - low, 0).prod(axis=1)
    area, object_area = detection[:, 2] * detection[:, 3], object_[:, 2] * object_[:, 3]
    union = np.where(crowd, area, area + object_area - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _mask_iou(
    masks: list[Any],
    truth: list[Any],
    crowd: Booleans,
    key: Integers,
    first: Integers,
    count: Integers,
) -> Floats:
    """IoU of each detection with each object of its group, in the order of the detections."""
    parts = [np.zeros(0)]
    for start, end in _runs(key):
        if count[start]:
            group = slice(first[start], first[start] + count[start])
            flags = crowd[group].astype(int).tolist()
            parts.append(coco_mask.iou(masks[start:end], truth[group], flags).reshape(-1))
    return np.concatenate(parts)


def _joined(parts: list[MatchedDetections]) -> MatchedDetections:
    return MatchedDetections(
        names=parts[0].names,
        num_objects=np.sum([part.num_objects for part in parts], axis=0),
        index=np.concatenate([part.index for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        label=np.concatenate([part.label for part in parts]),
        box=np.concatenate([part.box for part in parts]),
        matches={
            threshold: Matches(
                np.concatenate([part.matches[threshold].iou for part in parts]),
                np.concatenate([part.matches[threshold].ignored for part in parts]),
            )
            for threshold in parts[0].matches
        },
    )


def _error_in_cells(score: Floats, box: Floats, right: Floats, num_bins: int) -> float:
    """Expected calibration error over cells of score, centre and size, all in [0, 1]."""
    if not score.size:
        return float("nan")
    cell: NDArray[np.int64] = np.zeros(len(score), dtype=np.int64)
    for values in (score, *box.T):
        cell = cell * num_bins + bin_numbers(values, num_bins)
    _, number = np.unique(cell, return_inverse=True)
    return float(np.abs(np.bincount(number, weights=right - score)).sum() / len(score))


def _lrp(
    score: Floats, iou: Floats, num_objects: int, threshold: float
) -> tuple[float, float, float]:
    """LRP of all detections, the least over score thresholds, and the score where that is."""
    if not num_objects:
        return np.nan, np.nan, np.nan
    order = np.argsort(-score, kind="stable")
    score, iou = score[order], iou[order]
    right = iou > 0
    found = np.cumsum(right)
    location = np.cumsum(np.where(right, 1 - iou, 0)) / (1 - threshold)
    detections = np.arange(1, len(score) + 1)
    # (location + wrong + missed) / (found + wrong + missed), of the first 1, 2, ... detections
    error = (location + detections - found + num_objects - found) / (
        detections + num_objects - found
    )
    error = np.clip(error, 0.0, 1.0)  # rounding
    ends = np.flatnonzero(np.diff(score, append=-1))  # a threshold keeps all of one score or none
    if not ends.size:
        return 1.0, 1.0, np.nan
    best = ends[error[ends].argmin()]
    if error[best] >= 1:
        return float(error[-1]), 1.0, np.nan
    return float(error[-1]), float(error[best]), float(score[best])


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
