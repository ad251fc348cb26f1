"""Average precision of 3D detections by the rules of KITTI and of Waymo, on a CPU.

mmcv intersects rotated boxes; everything else is NumPy. KITTI's development kit is followed
exactly, including what one would not expect:

- Objects that are too small, occluded or truncated for a difficulty count neither as missed nor as
  found. The same holds for a class that looks like the evaluated one (Van for Car, Person_sitting
  for Pedestrian).
- Detections lower than the least height of a difficulty are left out, but such detections of
  *every* class may be matched to an object.
- Precision is taken at up to 41 scores that step through recall in fortieths. Each score has its
  own matching, in which an object takes the detection that overlaps it most.
- AP with 11 points is the mean of every fourth of these from recall 0 on; AP with 40 points leaves
  recall 0 out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from mmcv.ops import box_iou_rotated
from numpy.typing import NDArray

from polyfocal.data.kitti import MAX_OCCLUSION, MAX_TRUNCATION, MIN_HEIGHT

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

DIFFICULTIES = ("easy", "moderate", "hard")
KINDS = ("2D", "BEV", "3D")
STRICTNESS = ("strict", "loose")

_LOOKS_LIKE = {"car": "van", "pedestrian": "person_sitting"}
# Least overlap: strict, and loose from above and in 3D.
_CARS = ("car", "van")
_STRICT = (0.7, 0.5)
_LOOSE = (0.5, 0.25)
_RECALL_STEPS = 40


@dataclass
class Objects:
    """The objects or the detections of a frame.

    Attributes:
        names: (N,) names of the classes, ``DontCare`` included.
        boxes: (N, 7) float, x, y, z, length, height, width and rotation about y in the camera's
            frame (x to the right, y down, z ahead; metres, radians), the centre of the bottom
            being the position.
        image_boxes: (N, 4) float, x1, y1, x2, y2 in pixels.
        alpha: (N,) float, angle of observation, radians.
        truncated: (N,) float in [0, 1]; unused for detections.
        occluded: (N,) 0, 1, 2 or 3; unused for detections.
        scores: (N,) float; unused for objects.
    """

    names: NDArray[np.str_]
    boxes: Array
    image_boxes: Array
    alpha: Array
    truncated: Array = field(default_factory=lambda: np.zeros(0))
    occluded: Array = field(default_factory=lambda: np.zeros(0))
    scores: Array = field(default_factory=lambda: np.zeros(0))


def bev_overlaps(first: Array, second: Array) -> Array:
    """(N, M) intersections over unions of rectangles x, y, length, width, angle to the x axis."""
    if len(first) == 0 or len(second) == 0:
        return np.zeros((len(first), len(second)))
    # In single precision, which has more digits near zero.
    origin = np.append(second[:, :2].mean(0), np.zeros(3))
    boxes = [torch.as_tensor(boxes - origin, dtype=torch.float32) for boxes in (first, second)]
    return box_iou_rotated(*boxes).numpy().astype(np.float64)


def volume_overlaps(first: Array, second: Array) -> Array:
    """(N, M) of boxes x, y, z of the centre, length, width, height, angle in the plane x, y."""
    plane = bev_overlaps(first[:, [0, 1, 3, 4, 6]], second[:, [0, 1, 3, 4, 6]])
    areas, other_areas = (boxes[:, 3] * boxes[:, 4] for boxes in (first, second))
    shared_area = plane * (areas[:, None] + other_areas) / (1.0 + plane)
    top, other_top = (boxes[:, 2] + boxes[:, 5] / 2 for boxes in (first, second))
    bottom, other_bottom = (boxes[:, 2] - boxes[:, 5] / 2 for boxes in (first, second))
    height = np.minimum(top[:, None], other_top) - np.maximum(bottom[:, None], other_bottom)
    shared = shared_area * np.clip(height, 0.0, None)
    volumes = (areas * first[:, 5])[:, None] + other_areas * second[:, 5]
    return shared / np.maximum(volumes - shared, np.finfo(np.float64).tiny)


def _upright(boxes: Array) -> Array:
    """Boxes of the camera's frame with the height last: x, z, -y of the centre, l, w, h, angle."""
    x, y, z, length, height, width, rotation = boxes.T
    return np.stack([x, z, height / 2 - y, length, width, height, -rotation], axis=1)


def _image_areas(boxes: Array) -> Array:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _image_intersections(first: Array, second: Array) -> Array:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.clip(high - low, 0.0, None).prod(axis=2)


def _image_overlaps(first: Array, second: Array) -> Array:
    shared = _image_intersections(first, second)
    union = _image_areas(first)[:, None] + _image_areas(second) - shared
    return shared / np.maximum(union, np.finfo(np.float64).tiny)


class _Frame(NamedTuple):
    """What the evaluation of one class needs of a frame, detections (D) by objects (G)."""

    overlaps: dict[str, Array]
    valid: Bools  # (difficulties, G): objects that must be found; the others are ignored
    counted: Bools  # (difficulties, D): false for ignored detections
    present: Bools  # (difficulties, D): of the class or ignored
    scores: Array
    cosines: Array  # (D, G), of the difference of the angles of observation
    in_dont_care: Array  # (D, regions): share of the detection


def kitti_ap(
    truth: Sequence[Objects], detections: Sequence[Objects], classes: Iterable[str]
) -> dict[str, float]:
    """AP and average orientation similarity (AOS) as KITTI's benchmark measures them, in percent.

    Args:
        truth: One entry per frame.
        detections: The same frames in the same order.
        classes: The classes to evaluate. The least overlap is 0.7 for Car and Van and 0.5 for all
            others ("strict"); from above and in 3D also 0.5 and 0.25 ("loose").

    Returns:
        By ``{class}_{2D|BEV|3D|AOS}_{AP11|AP40}_{easy|moderate|hard}_{strict|loose}``, and the
        strict means over the classes, ``Overall_{...}_{...}_{easy|moderate|hard}``. NaN for a class
        without an object of that difficulty; a mean leaves it out.
    """
    numbers: dict[str, float] = {}
    strict: dict[str, list[float]] = {}
    classes = list(classes)
    for name in classes:
        frames = [_frame(t, d, name) for t, d in zip(truth, detections, strict=True)]
        frames = [frame for frame in frames if frame.valid.size or frame.present.any()]
        for level, difficulty in enumerate(DIFFICULTIES):
            for kind in KINDS:
                loose = _LOOSE if kind != "2D" else _STRICT
                for strictness, least in zip(STRICTNESS, (_STRICT, loose), strict=True):
                    overlap = least[0] if name.lower() in _CARS else least[1]
                    curves = dict(
                        zip((kind, "AOS"), _kitti_curves(frames, level, kind, overlap), strict=True)
                    )
                    if kind != "2D":
                        del curves["AOS"]
                    for what, curve in curves.items():
                        for points, value in (("AP11", curve[::4]), ("AP40", curve[1:])):
                            key = f"{what}_{points}_{difficulty}"
                            ap = float(value.mean() * 100)
                            numbers[f"{name}_{key}_{strictness}"] = ap
                            if strictness == "strict":
                                strict.setdefault(key, []).append(ap)
    for key, values in strict.items():
        known = [value for value in values if not np.isnan(value)]
        numbers[f"Overall_{key}"] = float(np.mean(known)) if known else float("nan")
    return numbers


def _frame(truth: Objects, found: Objects, name: str) -> _Frame:
    name = name.lower()
    names = np.char.lower(truth.names.astype(str))
    kept = (names == name) | (names == _LOOKS_LIKE.get(name, name))
    image_boxes = truth.image_boxes[kept]
    heights = image_boxes[:, 3] - image_boxes[:, 1]
    found_heights = np.abs(found.image_boxes[:, 3] - found.image_boxes[:, 1])
    of_class = np.char.lower(found.names.astype(str)) == name
    small = np.stack([found_heights < least for least in MIN_HEIGHT])
    limits = zip(MAX_OCCLUSION, MAX_TRUNCATION, MIN_HEIGHT, strict=True)
    valid = np.stack(
        [
            (names[kept] == name)
            & (truth.occluded[kept] <= occluded)
            & (truth.truncated[kept] <= truncated)
            & (heights > least)
            for occluded, truncated, least in limits
        ]
    )
    regions = truth.image_boxes[names == "dontcare"]
    area = np.maximum(_image_areas(found.image_boxes), np.finfo(np.float64).tiny)
    boxes, found_boxes = _upright(truth.boxes[kept]), _upright(found.boxes)
    plane = [0, 1, 3, 4, 6]
    return _Frame(
        overlaps={
            "2D": _image_overlaps(found.image_boxes, image_boxes),
            "BEV": bev_overlaps(found_boxes[:, plane], boxes[:, plane]),
            "3D": volume_overlaps(found_boxes, boxes),
        },
        valid=valid,
        counted=of_class & ~small,
        present=of_class | small,
        scores=found.scores,
        cosines=np.cos(found.alpha[:, None] - truth.alpha[kept]),
        in_dont_care=_image_intersections(found.image_boxes, regions) / area[:, None],
    )


def _kitti_curves(
    frames: list[_Frame], level: int, kind: str, overlap: float
) -> tuple[Array, Array]:
    """Precision and similarity of orientation at the 41 points; NaN without objects."""
    objects = sum(int(frame.valid[level].sum()) for frame in frames)
    curves = np.full((2, _RECALL_STEPS + 1), np.nan)
    if objects == 0:
        return curves[0], curves[1]
    scores = np.concatenate([_found_scores(frame, level, kind, overlap) for frame in frames])
    thresholds = _recall_thresholds(scores, objects)
    totals = np.zeros((3, len(thresholds)))
    for frame in frames:
        totals += _count(frame, level, kind, overlap, thresholds)
    true, false, similarity = totals
    curves[:] = 0.0
    detections = np.maximum(true + false, 1.0)
    for curve, values in zip(curves, (true / detections, similarity / detections), strict=True):
        curve[: len(values)] = np.maximum.accumulate(values[::-1])[::-1]
    return curves[0], curves[1]


def _found_scores(frame: _Frame, level: int, kind: str, overlap: float) -> Array:
    """Scores of the found objects, if each takes the overlapping detection of the best score."""
    free = frame.present[level].copy()
    scores = []
    for index, valid in enumerate(frame.valid[level]):
        candidates = np.flatnonzero(free & (frame.overlaps[kind][:, index] > overlap))
        if len(candidates) == 0:
            continue
        taken = candidates[frame.scores[candidates].argmax()]
        free[taken] = False
        if valid and frame.counted[level, taken]:
            scores.append(frame.scores[taken])
    return np.array(scores, dtype=np.float64)


def _recall_thresholds(scores: Array, objects: int) -> Array:
    """The scores whose recall is nearest to 0, 1/40, 2/40, ..."""
    scores = np.sort(scores)[::-1]
    thresholds: list[float] = []
    recall = 0.0
    for index, score in enumerate(scores, start=1):
        here, there = index / objects, (index + 1) / objects
        if index < len(scores) and there - recall < recall - here:
            continue
        thresholds.append(score)
        recall += 1.0 / _RECALL_STEPS
    return np.array(thresholds)


def _count(frame: _Frame, level: int, kind: str, overlap: float, thresholds: Array) -> Array:
    """(3, thresholds): true positives, false positives, and the sum of their similarities."""
    overlaps = frame.overlaps[kind]
    counted = frame.counted[level]
    free = frame.present[level] & (frame.scores >= thresholds[:, None])
    true, similarity = np.zeros((2, len(thresholds)))
    rows = np.arange(len(thresholds))
    for index in np.flatnonzero((overlaps > overlap).any(0)):
        candidates = free & (overlaps[:, index] > overlap)
        proper = candidates & counted
        has_proper, has_any = proper.any(1), candidates.any(1)
        # If there is no other detection, the first ignored one is taken.
        best = np.where(proper, overlaps[:, index], -1.0).argmax(1)
        taken = np.where(has_proper, best, candidates.argmax(1))
        free[rows[has_any], taken[has_any]] = False
        if frame.valid[level, index]:
            true += has_proper
            similarity += has_proper * (1.0 + frame.cosines[taken, index]) / 2.0
    free &= counted
    if kind == "2D":
        free &= ~(frame.in_dont_care > overlap).any(1)
    return np.stack([true, free.sum(1), similarity])


@dataclass
class Boxes:
    """The objects or the detections of a frame, in any frame with z up.

    Attributes:
        names: (N,) of the classes.
        boxes: (N, 7) float, x, y, z of the centre, length, width, height in metres and heading in
            radians.
        points: (N,) LiDAR points in the box; unused for detections.
        scores: (N,) float; unused for objects.
    """

    names: NDArray[np.str_]
    boxes: Array
    points: Array = field(default_factory=lambda: np.zeros(0))
    scores: Array = field(default_factory=lambda: np.zeros(0))


def waymo_ap(
    truth: Sequence[Boxes],
    detections: Sequence[Boxes],
    classes: Iterable[str],
    overlap: float | None = None,
) -> dict[str, float]:
    """AP and AP weighted by heading (APH) of 3D boxes, in the manner of Waymo's benchmark.

    Level 1 holds the objects with more than 5 points, level 2 all objects with a point. Others are
    neither missed nor found. Detections take objects in the order of their scores, each the free
    object that it overlaps most. A match counts 1 - |difference of heading| / pi in APH. AP is
    the area below precision over recall, where precision is the best at that recall or more.

    Waymo's own program pairs by an optimal assignment at a hundred scores, and uses the level that
    an annotator gave, if there is one. So its numbers may differ in the last digit.

    Args:
        truth: One entry per frame.
        detections: The same frames in the same order.
        classes: The classes to evaluate.
        overlap: Least intersection over union in 3D; None for 0.7 for vehicles and cars, 0.5 for
            all others.

    Returns:
        Fractions by ``{class}/L{1|2} mAP`` and ``{class}/L{1|2} mAPH``, and the means over the
        classes, ``Overall/...``. NaN without objects.
    """
    numbers: dict[str, float] = {}
    classes = list(classes)
    for name in classes:
        least = overlap
        if least is None:
            least = 0.7 if name.lower() in (*_CARS, "vehicle") else 0.5
        pairs = list(zip(truth, detections, strict=True))
        matches = [_pair_by_score(t, d, name, least) for t, d in pairs]
        scores, points, headings = (np.concatenate(column) for column in zip(*matches, strict=True))
        order = np.argsort(-scores, kind="stable")
        points, headings = points[order], headings[order]
        for level, fewest in ((1, 6), (2, 1)):
            objects = sum(int((t.points[t.names == name] >= fewest).sum()) for t, _ in pairs)
            # -1 for a false positive; a detection of an object that does not count is left out.
            counts = (points >= fewest) | (points < 0)
            found = (points >= fewest)[counts]
            for key, value in (("mAP", found), ("mAPH", found * headings[counts])):
                numbers[f"{name}/L{level} {key}"] = _area(value.astype(np.float64), objects)
    for key in ("L1 mAP", "L1 mAPH", "L2 mAP", "L2 mAPH"):
        known = [v for name in classes if not np.isnan(v := numbers[f"{name}/{key}"])]
        numbers[f"Overall/{key}"] = float(np.mean(known)) if known else float("nan")
    return numbers


def _pair_by_score(
    truth: Boxes, found: Boxes, name: str, overlap: float
) -> tuple[Array, Array, Array]:
    """For each detection its score, the points of its object (-1 for none), and its heading."""
    mine, kept = truth.names == name, found.names == name
    boxes, found_boxes = truth.boxes[mine], found.boxes[kept]
    scores, object_points = found.scores[kept], truth.points[mine]
    overlaps = volume_overlaps(found_boxes, boxes)
    points, headings = np.full(len(scores), -1.0), np.zeros(len(scores))
    for index in np.argsort(-scores, kind="stable"):
        if overlaps.shape[1] == 0 or overlaps[index].max() < overlap:
            continue
        taken = overlaps[index].argmax()
        overlaps[:, taken] = -1.0
        points[index] = object_points[taken]
        turn = found_boxes[index, 6] - boxes[taken, 6]
        headings[index] = 1.0 - abs((turn + np.pi) % (2 * np.pi) - np.pi) / np.pi
    return scores, points, headings


def _area(found: Array, objects: int) -> float:
    """The area below the curve of precision over recall, from matches in the order of scores."""
    if objects == 0:
        return float("nan")
    recall = np.cumsum(found) / objects
    precision = np.cumsum(found) / np.arange(1, len(found) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())
