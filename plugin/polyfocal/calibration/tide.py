"""What kinds of mistakes a detector makes, and what average precision each of them costs.

The six types and their cost are those of Bolya et al., TIDE: A General Toolbox for Identifying
Object Detection Errors (2020), section 2. With t_f = 0.5 and t_b = 0.1, a detection that COCO's
matching calls wrong at t_f is the first of

- ``Loc``: its best overlap with an object of its class is in [t_b, t_f]: badly localised;
- ``Cls``: its best overlap with an object of another class is at least t_f: the wrong class;
- ``Dupe``: it overlaps an object of its class by t_f that another detection has found;
- ``Bkg``: it overlaps no object by more than t_b: background;
- ``Both``: what is left, the wrong class and badly localised.

An object that no detection finds, and that no ``Loc`` or ``Cls`` would find if it were put right,
is ``Miss``.
The cost of a type is the AP at t_f that would be gained if only these mistakes were put right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from rich.table import Table

from polyfocal.calibration.classification import Floats, Integers
from polyfocal.calibration.detection import Booleans, every_overlap, match
from polyfocal.data.annotations import Annotations
from polyfocal.data.detections import Detections, Kind
from polyfocal.data.evaluation import truth_for
from polyfocal.tables import table

FOREGROUND = 0.5
BACKGROUND = 0.1
TYPES = {
    "Cls": "wrong class",
    "Loc": "badly localised",
    "Both": "wrong class and badly localised",
    "Dupe": "found twice",
    "Bkg": "background",
    "Miss": "missed object",
}
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Mistakes:
    """The mistakes of a detector, AP in [0, 1].

    Attributes:
        ap: AP at IoU 0.5, the mean over the classes that have objects.
        count: Number of mistakes of each type.
        cost: The AP that would be gained if the mistakes of a type were put right.
        false_positives: The AP that would be gained if all right detections came first.
        false_negatives: The AP that would be gained without the objects that were not found.
    """

    ap: float
    count: dict[str, int]
    cost: dict[str, float]
    false_positives: float
    false_negatives: float


def mistakes(
    ground_truth: str | Path | COCO | Annotations,
    results: Sequence[dict[str, Any]] | str | Path | Detections,
    kind: Kind = "bbox",
    max_dets: int = 100,
) -> Mistakes:
    """Sort the mistakes of a detector by their type, and say what each type costs.

    Detections that lie in crowd regions are no mistakes, as in COCO's evaluation.

    Args:
        ground_truth: As in :func:`polyfocal.coco.evaluate`, as are the others.
        results: Detections; scores in [0, 1].
        kind: Compare boxes or masks.
        max_dets: Most detections counted of a category in a picture.

    Raises:
        DatasetError: The results do not fit the ground truth.
    """
    truth = truth_for(ground_truth, kind)
    detections = Detections.of(results)
    matched = match(truth, detections, [FOREGROUND], kind, max_dets)
    at = matched.matches[FOREGROUND]
    kept = np.flatnonzero(~at.ignored)
    kept = kept[np.argsort(-matched.score[kept], kind="stable")]
    score, label, right = matched.score[kept], matched.label[kept], at.right[kept]
    entries = [detections.entries[row] for row in matched.index[kept].tolist()]

    objects = truth.objects
    labels = {category["id"]: row for row, category in enumerate(truth.categories)}
    object_label = np.array([labels[one["category_id"]] for one in objects], dtype=np.int64)
    found = np.zeros(len(objects), dtype=bool)
    place = {id(one): row for row, one in enumerate(objects)}
    numbers = [place[id(truth.annotations[row])] for row in at.object_[kept[right]].tolist()]
    found[numbers] = True

    # Every wrong detection with every object of its picture: the best of its class, of the others.
    wrong = np.flatnonzero(~right)
    pair_d, pair_g, iou = every_overlap(truth, [entries[row] for row in wrong.tolist()], kind)
    same = label[wrong][pair_d] == object_label[pair_g]
    best_same, object_same = _best(pair_d[same], pair_g[same], iou[same], len(wrong))
    best_other, object_other = _best(pair_d[~same], pair_g[~same], iou[~same], len(wrong))

    loc = (best_same >= BACKGROUND) & (best_same <= FOREGROUND)
    cls = ~loc & (best_other >= FOREGROUND)
    dupe = ~loc & ~cls & (best_same >= FOREGROUND)
    bkg = ~loc & ~cls & ~dupe & (np.maximum(best_same, best_other) <= BACKGROUND)
    both = ~(loc | cls | dupe | bkg)

    # Of those that would find one and the same free object, the one of the highest score does.
    would = np.where(loc, object_same, np.where(cls, object_other, -1))
    able = (would >= 0) & ~found[would] if len(objects) else np.zeros(len(wrong), dtype=bool)
    _, firsts = np.unique(would[able], return_index=True)
    winner = np.zeros(len(wrong), dtype=bool)
    winner[np.flatnonzero(able)[firsts]] = True
    missed = ~found
    missed[would[able]] = False

    counts = np.bincount(object_label, minlength=len(labels))
    ap = _average_precision(score, label, right, counts, counts)
    cost = {}
    for name, chosen in {"Cls": cls, "Loc": loc, "Both": both, "Dupe": dupe, "Bkg": bkg}.items():
        fixed_label, fixed_right = label.copy(), right.copy()
        put_right = wrong[chosen & winner]
        fixed_right[put_right] = True
        if len(put_right):
            fixed_label[put_right] = object_label[would[chosen & winner]]
        stays = np.ones(len(score), dtype=bool)
        stays[wrong[chosen & ~winner]] = False
        fixed = _average_precision(
            score[stays], fixed_label[stays], fixed_right[stays], counts, counts
        )
        cost[name] = fixed - ap
    without = counts - np.bincount(object_label[missed], minlength=len(labels))
    cost["Miss"] = _average_precision(score, label, right, without, counts) - ap
    sorted_out = _average_precision(np.where(right, 1.0, 0.0), label, right, counts, counts)
    all_found = np.bincount(label[right], minlength=len(labels))
    complete = _average_precision(score, label, right, all_found, counts)
    return Mistakes(
        ap=ap,
        count={
            "Cls": int(cls.sum()),
            "Loc": int(loc.sum()),
            "Both": int(both.sum()),
            "Dupe": int(dupe.sum()),
            "Bkg": int(bkg.sum()),
            "Miss": int(missed.sum()),
        },
        cost={name: cost[name] for name in TYPES},
        false_positives=sorted_out - ap,
        false_negatives=complete - ap,
    )


def mistakes_table(found: Mistakes) -> Table:
    """The mistakes for a terminal, AP in percent."""
    rows = [
        [f"{name}, {meaning}", str(found.count[name]), f"{100 * found.cost[name]:.1f}"]
        for name, meaning in TYPES.items()
    ]
    rows.append(["all false positives", "", f"{100 * found.false_positives:.1f}"])
    rows.append(["all false negatives", "", f"{100 * found.false_negatives:.1f}"])
    title = f"Mistakes at IoU 0.5, where AP is {100 * found.ap:.1f}"
    return table(title, ("", "count", "costs AP"), rows)


def _best(pair_d: Integers, pair_g: Integers, iou: Floats, count: int) -> tuple[Floats, Integers]:
    """The largest overlap of each detection, and the first object that has it; -1 for none."""
    order = np.lexsort((pair_g, -iou, pair_d))
    first, rows = np.unique(pair_d[order], return_index=True)
    best, object_ = np.zeros(count), np.full(count, -1, dtype=np.int64)
    best[first] = iou[order][rows]
    object_[first] = pair_g[order][rows]
    return best, object_


def _average_precision(
    score: Floats, label: Integers, right: Booleans, objects: Integers, classes: Integers
) -> float:
    """AP as COCO measures it at one threshold, the mean over the classes with ``classes`` > 0."""
    order = np.lexsort((-score, label))
    label, right = label[order], right[order]
    borders = np.searchsorted(label, np.arange(len(classes) + 1))
    total = 0.0
    there = np.flatnonzero(classes > 0)
    for c in there.tolist():
        hit = np.flatnonzero(right[borders[c] : borders[c + 1]])
        if not len(hit) or not objects[c]:
            continue
        found = np.arange(1, len(hit) + 1)
        best = np.maximum.accumulate((found / (hit + 1))[::-1])[::-1]
        at = np.searchsorted(found / objects[c], _RECALLS)
        total += best[at[at < len(best)]].sum() / len(_RECALLS)
    return float(total / len(there)) if len(there) else float("nan")
