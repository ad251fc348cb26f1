"""The lowest score of a kept detection, per class: the one with the largest F1 on a split.

Thresholds chosen on one split are for another: on its own split every threshold looks good.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from rich.table import Table

from polyfocal.calibration.classification import Floats, as_array
from polyfocal.calibration.detection import Booleans, MatchedDetections
from polyfocal.data.files import read_json, write_text
from polyfocal.errors import UserError
from polyfocal.tables import table

_FORMAT = "polyfocal thresholds 1"


class Point(NamedTuple):
    """What a threshold does on a split.

    Attributes:
        objects: Objects that can be found.
        detections: Kept detections, without those in crowd regions.
        right: Right ones of these detections.
        threshold: Lowest score of a kept detection.
    """

    objects: int
    detections: int
    right: int
    threshold: float

    @property
    def precision(self) -> float:
        """The part of the detections that is right; NaN without detections."""
        return self.right / self.detections if self.detections else float("nan")

    @property
    def recall(self) -> float:
        """The part of the objects that is found; NaN without objects."""
        return self.right / self.objects if self.objects else float("nan")

    @property
    def f1(self) -> float:
        """2 right / (detections + objects); NaN without either."""
        both = self.detections + self.objects
        return 2 * self.right / both if both else float("nan")


@dataclass(frozen=True)
class Thresholds:
    """A score threshold for each class.

    Attributes:
        iou: IoU from which a detection was right when the thresholds were chosen.
        shared: Threshold of all classes together.
        classes: Thresholds by the names of the classes; a class without one takes the shared one.
    """

    iou: float
    shared: float
    classes: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """The threshold of a class."""
        return self.classes.get(name, self.shared)

    def kept(self, scores: ArrayLike, classes: Sequence[str]) -> Booleans:
        """Which detections are kept.

        Args:
            scores: (N,), an array or a torch tensor.
            classes: Name of the class of each detection.

        Returns:
            (N,) bool.
        """
        given = as_array(scores).astype(np.float64).reshape(-1)
        return given >= np.array([self.of(name) for name in classes], dtype=np.float64)

    def save(self, file: str | Path) -> None:
        """Write the thresholds as JSON.

        Raises:
            UserError: The file cannot be written.
        """
        content = {
            "format": _FORMAT,
            "iou": self.iou,
            "shared": self.shared,
            "classes": dict(self.classes),
        }
        write_text(file, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "Thresholds":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: The file is something else.
        """
        content = read_json(Path(file))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UserError(
                f"{file} holds no thresholds: it must hold a JSON object with the format "
                f"{_FORMAT!r}, as tools/calibration.py --thresholds writes it."
            )
        iou: Any = content.get("iou")
        shared: Any = content.get("shared")
        classes = content.get("classes")
        if not isinstance(classes, dict):
            raise UserError(f"{file} must have an object 'classes', got {classes!r}.")
        numbers: dict[str, Any] = {"iou": iou, "shared": shared, **classes}
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise UserError(f"{file} has {value!r} for {name}: expected a number in [0, 1].")
        return cls(iou, shared, classes)


def best_f1(matched: MatchedDetections, iou: float = 0.5) -> tuple[Thresholds, dict[str, Point]]:
    """The thresholds per class with the largest F1 on a split.

    Of thresholds with the same F1 the highest is taken. A threshold lies halfway from the
    lowest score that it keeps to the next one below, so that rounding does not move a detection.
    A class of which no detection is right takes the threshold that is best for all together.

    Args:
        matched: From :func:`polyfocal.calibration.match`, with ``iou`` among the thresholds.
        iou: IoU from which a detection is right.

    Returns:
        The thresholds, and what they do, by class.

    Raises:
        UserError: No detection of the split is right.
    """
    rows = ~matched.matches[iou].ignored
    score, right = matched.score[rows], matched.matches[iou].right[rows]
    label = matched.label[rows]
    shared = _best(score, right, int(matched.num_objects.sum()))
    if shared is None:
        raise UserError(
            f"no detection is right at IoU {iou:g}, so that no threshold is better than another: "
            f"{len(score)} detections, {matched.num_objects.sum()} objects."
        )
    classes = {}
    for number, name in enumerate(matched.names):
        own = label == number
        best = _best(score[own], right[own], int(matched.num_objects[number]))
        if best is not None:
            classes[name] = best
    thresholds = Thresholds(iou, shared, classes)
    return thresholds, points(matched, thresholds)


def points(matched: MatchedDetections, thresholds: Thresholds) -> dict[str, Point]:
    """What thresholds do on a split, by class.

    Args:
        matched: From :func:`polyfocal.calibration.match`, with their ``iou`` among the thresholds.
        thresholds: Thresholds of this split or of another.
    """
    at = matched.matches[thresholds.iou]
    limits = np.array([thresholds.of(name) for name in matched.names])
    kept = ~at.ignored & (matched.score >= limits[matched.label])
    count = len(matched.names)
    detections = np.bincount(matched.label[kept], minlength=count)
    right = np.bincount(matched.label[kept & at.right], minlength=count)
    return {
        name: Point(
            int(matched.num_objects[number]),
            int(detections[number]),
            int(right[number]),
            float(limits[number]),
        )
        for number, name in enumerate(matched.names)
    }


def points_table(found: Mapping[str, Point], iou: float) -> Table:
    """What thresholds do, by class and in the mean of the classes that have objects."""
    rows: list[list[str | float]] = [
        [name, *map(str, one[:3]), one.threshold, one.precision, one.recall, one.f1]
        for name, one in found.items()
    ]
    rows.append(["mean", "", "", "", "", *mean_point(found).values()])
    header = ("", "objects", "kept", "right", "threshold", "precision", "recall", "F1")
    made = table(f"At the thresholds, IoU {iou:g}", header, rows)
    made.rows[-1].style = "bold"
    return made


def mean_point(found: Mapping[str, Point]) -> dict[str, float]:
    """``precision``, ``recall`` and ``F1``, the mean over the classes that have objects.

    A class without kept detections has no precision, and does not count in its mean.
    """
    measured = [one for one in found.values() if one.objects]
    columns = {
        "precision": [one.precision for one in measured if one.detections],
        "recall": [one.recall for one in measured],
        "F1": [one.f1 for one in measured],
    }
    return {
        name: float(np.mean(values)) if values else float("nan") for name, values in columns.items()
    }


def _best(score: Floats, right: Booleans, objects: int) -> float | None:
    """The threshold of the largest F1; None if that F1 is 0."""
    order = np.argsort(-score, kind="stable")
    score, found = score[order], np.cumsum(right[order])
    ends = np.flatnonzero(np.diff(score, append=-1))  # a threshold keeps all of one score or none
    if not ends.size:
        return None
    f1 = 2 * found[ends] / (ends + 1 + objects)
    best = int(f1.argmax())
    if not f1[best] > 0:
        return None
    last = float(score[ends[best]])
    below = float(score[ends[best + 1]]) if best + 1 < len(ends) else 0.0
    return (last + below) / 2
