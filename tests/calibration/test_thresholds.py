"""Thresholds with the largest F1, against a search over all of them and numbers by hand."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")

from polyfocal.calibration import match
from polyfocal.calibration.thresholds import Point, Thresholds, best_f1, points
from polyfocal.errors import UserError

SIDE = 100


def scene(objects, detections, classes=("cat", "dog"), crowds=()):
    """Objects and detections as (class, place[, score]) in one picture; places do not overlap."""

    def box(place):
        return [20 * (place % 5), 20 * (place // 5), 18, 18]

    truth = {
        "images": [{"id": 1, "width": SIDE, "height": SIDE, "file_name": "a.png"}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
        "annotations": [
            {
                "id": n,
                "image_id": 1,
                "category_id": 1 + classes.index(name),
                "bbox": box(place),
                "area": 324,
                "iscrowd": int(place in crowds),
            }
            for n, (name, place) in enumerate(objects, start=1)
        ],
    }
    results = [
        {
            "image_id": 1,
            "category_id": 1 + classes.index(name),
            "bbox": box(place),
            "score": score,
        }
        for name, place, score in detections
    ]
    return truth, results


def matched(tmp_path, *args, iou=0.5, **settings):
    truth, results = scene(*args, **settings)
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    return match(file, results, [iou])


def test_by_hand(tmp_path):
    """cat: right, wrong, right of 2 objects; dog: right, wrong, wrong of 3."""
    found = matched(
        tmp_path,
        [("cat", 0), ("cat", 1), ("dog", 2), ("dog", 3), ("dog", 4)],
        [
            *(("cat", 0, 0.9), ("cat", 7, 0.8), ("cat", 1, 0.4)),
            *(("dog", 2, 0.5), ("dog", 8, 0.3), ("dog", 9, 0.2)),
        ],
    )
    thresholds, at = best_f1(found)
    # cat: F1 2/3, 2/4, 4/5; dog: 2/4, 2/5, 2/6. Half of the way to the next score, or to 0.
    assert thresholds.classes == {"cat": pytest.approx(0.2), "dog": pytest.approx(0.4)}
    assert at["cat"] == Point(2, 3, 2, pytest.approx(0.2))
    assert (at["cat"].precision, at["cat"].recall, at["cat"].f1) == pytest.approx((2 / 3, 1, 0.8))
    assert (at["dog"].precision, at["dog"].recall, at["dog"].f1) == pytest.approx((1, 1 / 3, 0.5))
    # Together: 0.9, 0.5 and 0.4 right of 5 objects, F1 2/6, 2/7, 4/8, 6/9, 6/10, 6/11.
    assert thresholds.shared == pytest.approx(0.35)


def test_a_class_without_a_right_detection_takes_the_shared_one(tmp_path):
    found = matched(
        tmp_path,
        [("cat", 0), ("dog", 1)],
        [("cat", 0, 0.9), ("dog", 5, 0.7)],
        classes=("cat", "dog", "owl"),
    )
    thresholds, at = best_f1(found)
    assert thresholds.classes == {"cat": 0.45}
    # 0.9 right, 0.7 wrong, two objects: F1 2/3 and 2/4.
    assert thresholds.of("dog") == thresholds.of("owl") == pytest.approx(0.8)
    assert at["dog"].detections == 0 and math.isnan(at["dog"].precision)
    assert math.isnan(at["owl"].f1)


def test_a_crowd_counts_as_neither(tmp_path):
    found = matched(
        tmp_path, [("cat", 0), ("cat", 1)], [("cat", 0, 0.5), ("cat", 1, 0.9)], crowds=(1,)
    )
    thresholds, at = best_f1(found)
    assert at["cat"] == Point(1, 1, 1, 0.25)
    assert thresholds.classes == {"cat": 0.25}


def test_no_other_threshold_is_better(tmp_path):
    rng = np.random.default_rng(0)
    objects = [("cat", place) for place in range(0, 20, 2)]
    # Scores with ties; a right detection is more often of a high score.
    detections = [
        ("cat", place, round(rng.uniform(0.2, 1) if place % 2 == 0 else rng.uniform(0, 0.8), 1))
        for place in rng.permutation(20).tolist()
    ]
    found = matched(tmp_path, objects, detections)
    thresholds, at = best_f1(found)
    others = [
        points(found, Thresholds(0.5, t, {}))["cat"].f1 for t in np.linspace(0, 1, 201).tolist()
    ]
    assert at["cat"].f1 == pytest.approx(np.nanmax(others))
    assert not (np.abs(found.score - thresholds.of("cat")) < 1e-3).any(), "between two scores"


def test_the_file(tmp_path):
    file = tmp_path / "thresholds.json"
    written = Thresholds(0.5, 0.25, {"cat": 0.4, "Größe": 1})
    written.save(file)
    read = Thresholds.load(file)
    assert read == written
    assert read.kept([0.4, 0.39, 0.25, 0.2], ["cat", "cat", "dog", "dog"]).tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert read.kept([], []).shape == (0,)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "holds no thresholds"),
        ('{"format": "polyfocal calibrator 1"}', "as tools/calibration.py --thresholds writes it"),
        ('{"format": "polyfocal thresholds 1"}', "must have an object 'classes'"),
        (
            '{"format": "polyfocal thresholds 1", "iou": 0.5, "shared": 0.3, "classes": {"a": 7}}',
            r"has 7 for a: expected a number in \[0, 1\]",
        ),
        (
            '{"format": "polyfocal thresholds 1", "iou": 0.5, "shared": true, "classes": {}}',
            "has True for shared",
        ),
        (
            '{"format": "polyfocal thresholds 1", "iou": 0.5, "shared": NaN, "classes": {}}',
            "NaN|nan",
        ),
    ],
)
def test_refuses_a_file(tmp_path, content, sentence):
    file = tmp_path / "thresholds.json"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        Thresholds.load(file)


def test_nothing_right_is_refused(tmp_path):
    found = matched(tmp_path, [("cat", 0)], [("cat", 5, 0.9)])
    with pytest.raises(UserError, match="no detection is right at IoU 0.5.*1 detections, 1 obj"):
        best_f1(found)
