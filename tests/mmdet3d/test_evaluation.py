"""KITTI's and Waymo's AP: values worked out by hand, and MMDetection3D's own evaluation."""

import pickle
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "mmdet3d", reason="mmdet3d is not installed: make setup-3d", exc_type=ImportError
)

from polyfocal.mmdet3d.evaluation import (
    Boxes,
    Objects,
    bev_overlaps,
    kitti_ap,
    volume_overlaps,
    waymo_ap,
)

CLASSES = ("Car", "Pedestrian", "Cyclist")


def frame(names, scores=(), places=None, height=50.0, alpha=0.0, truncated=0.0, occluded=0):
    """Objects side by side, of 4 x 2 x 2 m, 20 m apart; one place or more may be given."""
    count = len(names)
    x = 20.0 * np.arange(count) if places is None else np.asarray(places, dtype=float)
    boxes = np.zeros((count, 7))
    boxes[:, 0], boxes[:, 2], boxes[:, 3:6] = x, 10.0, (4.0, 2.0, 2.0)
    left = 100.0 * x / 20.0
    image = np.stack([left, np.zeros(count), left + 60.0, np.full(count, height)], axis=1)
    ones = np.ones(count)
    return Objects(
        np.array(names, dtype=str),
        boxes,
        image,
        alpha * ones,
        truncated * ones,
        occluded * ones,
        np.array(scores, dtype=float),
    )


def test_overlap_of_turned_rectangles():
    square = np.array([[50.0, 20.0, 1.0, 1.0, 0.0]])
    turned = np.array([[50.0, 20.0, 1.0, 1.0, np.pi / 4]])
    octagon = 2 * (np.sqrt(2) - 1)
    assert bev_overlaps(square, turned)[0, 0] == pytest.approx(octagon / (2 - octagon), abs=1e-5)
    for angle in (0.5, -1.0, 2.5):  # half of the length apart, along the heading
        one = np.array([[3.0, 4.0, 4.0, 1.0, angle]])
        other = one + np.array([2 * np.cos(angle), 2 * np.sin(angle), 0, 0, 0])
        assert bev_overlaps(one, other)[0, 0] == pytest.approx(1 / 3, abs=1e-5)
    assert bev_overlaps(square[:0], turned).shape == (0, 1)


def test_overlap_of_volumes():
    box = np.array([[0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.3]])
    up = np.array([0, 0, 1, 0, 0, 0, 0])
    assert volume_overlaps(box, box + up)[0, 0] == pytest.approx(4 / 12, abs=1e-5)
    assert volume_overlaps(box, box + 2.5 * up)[0, 0] == 0


def test_rotation_about_the_camera_axis_turns_as_kitti_says():
    # The heading of rotation_y is (cos, -sin) in (x, z): moved along it by a half of the length,
    # a third is shared; moved across it, less.
    truth, found = frame(["Car"]), frame(["Car"], [0.9])
    truth.boxes[0, 6] = found.boxes[0, 6] = 0.5
    found.boxes[0, [0, 2]] += 0.6 * np.array([np.cos(0.5), -np.sin(0.5)])  # IoU 3.4 / 4.6 = 0.74
    assert kitti_ap([truth], [found], ["Car"])["Car_BEV_AP11_easy_strict"] > 0
    found.boxes[0, [0, 2]] += 0.6 * np.array([np.cos(0.5), -np.sin(0.5)])  # 2.8 / 5.2 = 0.54
    numbers = kitti_ap([truth], [found], ["Car"])
    assert numbers["Car_BEV_AP11_easy_strict"] == 0
    assert numbers["Car_BEV_AP11_easy_loose"] > 0


def test_one_object_gives_one_point_of_41():
    numbers = kitti_ap([frame(["Car"])], [frame(["Car"], [0.9])], ["Car"])
    for kind in ("2D", "BEV", "3D", "AOS"):
        assert numbers[f"Car_{kind}_AP11_moderate_strict"] == pytest.approx(100 / 11)
        assert numbers[f"Car_{kind}_AP40_moderate_strict"] == 0


@pytest.mark.parametrize("count", [2, 17, 41, 60])
def test_a_perfect_detector_reaches_the_points_that_its_objects_allow(count):
    """What docs/detection3d.md says, a class's AP40 from its number of objects."""
    found = frame(["Car"] * count, np.linspace(0.1, 0.9, count))
    numbers = kitti_ap([frame(["Car"] * count)], [found], ["Car"])
    wanted = min(100.0, 100 * (count - 1) / 40)
    assert numbers["Car_3D_AP40_moderate_strict"] == pytest.approx(wanted)


@pytest.mark.parametrize("false", [0, 1])
def test_forty_objects(false):
    # All are found at scores of their own: 40 points of 41; a false positive before them makes
    # precision 40/41 at the end, and so everywhere.
    truth = frame(["Car"] * 40)
    places = [*(20.0 * np.arange(40)), *([-100.0] * false)]
    found = frame(["Car"] * (40 + false), [*np.linspace(0.1, 0.8, 40), *([0.9] * false)], places)
    numbers = kitti_ap([truth], [found], ["Car"])
    precision = 40 / (40 + false)
    for kind in ("2D", "BEV", "3D"):
        assert numbers[f"Car_{kind}_AP40_easy_strict"] == pytest.approx(97.5 * precision)
        assert numbers[f"Car_{kind}_AP11_easy_strict"] == pytest.approx(1000 / 11 * precision)
    assert numbers["Overall_3D_AP40_easy"] == numbers["Car_3D_AP40_easy_strict"]


def test_orientation_of_the_wrong_way_round_is_worth_nothing():
    truth = frame(["Car"] * 40)
    for turn, share in ((np.pi, 0.0), (np.pi / 2, 0.5)):
        found = frame(["Car"] * 40, np.linspace(0.1, 0.9, 40), alpha=turn)
        numbers = kitti_ap([truth], [found], ["Car"])
        assert numbers["Car_2D_AP40_easy_strict"] == pytest.approx(97.5)
        assert numbers["Car_AOS_AP40_easy_strict"] == pytest.approx(97.5 * share, abs=1e-9)


def test_what_a_difficulty_ignores_is_neither_missed_nor_false():
    truth = frame(["Car"] * 40)
    truth.occluded[20:] = 2  # hard only
    found = frame(["Car"] * 40, np.linspace(0.1, 0.9, 40)[::-1])
    numbers = kitti_ap([truth], [found], ["Car"])
    assert numbers["Car_3D_AP40_hard_strict"] == pytest.approx(97.5)
    # 20 objects make 20 scores, and the steps of a fortieth let 20 points pass at most.
    assert numbers["Car_3D_AP40_easy_strict"] == pytest.approx(100 * 19 / 40)


@pytest.mark.parametrize("name", ["Van", "Truck"])
def test_a_van_is_no_false_car_and_a_truck_is(name):
    names = ["Car"] * 40 + [name]
    found = frame(["Car"] * 41, [*np.linspace(0.1, 0.8, 40), 0.9])
    ap = kitti_ap([frame(names)], [found], ["Car"])["Car_3D_AP40_easy_strict"]
    assert ap == pytest.approx(97.5 * (1 if name == "Van" else 40 / 41))


def test_dont_care_regions_excuse_in_the_picture_only():
    truth = frame(["Car"] * 40 + ["DontCare"])
    truth.boxes[40] = [-1000, -1000, -1000, -1, -1, -1, -10]
    found = frame(["Car"] * 41, [*np.linspace(0.1, 0.8, 40), 0.9])
    numbers = kitti_ap([truth], [found], ["Car"])
    assert numbers["Car_2D_AP40_easy_strict"] == pytest.approx(97.5)
    assert numbers["Car_3D_AP40_easy_strict"] == pytest.approx(97.5 * 40 / 41)


def test_nothing_to_find_and_nothing_found():
    empty = frame([])
    none = kitti_ap([empty], [frame(["Car"], [0.5])], ["Car"])
    assert np.isnan(none["Car_3D_AP40_easy_strict"]) and np.isnan(none["Overall_3D_AP40_easy"])
    assert kitti_ap([frame(["Car"])], [empty], ["Car"])["Car_3D_AP11_easy_strict"] == 0


def scene(seed):
    """Labels of a frame and detections near to them, as dictionaries of MMDetection3D."""
    random = np.random.default_rng(seed)
    count = 12
    names = random.choice(["Car", "Car", "Car", "Pedestrian", "Cyclist", "Van", "Truck"], count)
    location = np.stack(
        [random.uniform(-10, 10, count), np.full(count, 1.6), random.uniform(5, 40, count)], axis=1
    )
    size = np.where(
        np.isin(names, ("Pedestrian", "Cyclist"))[:, None], (1.0, 1.7, 0.7), (4.0, 1.5, 1.7)
    )
    x = random.uniform(0, 1100, count)
    y = random.uniform(100, 200, count)
    extent = random.uniform(20, 120, (count, 2))
    truth = {
        "name": names,
        "truncated": random.choice([0, 0, 0.2, 0.4], count),
        "occluded": random.choice([0, 0, 1, 2, 3], count).astype(float),
        "alpha": random.uniform(-3, 3, count),
        "bbox": np.stack([x, y, x + extent[:, 0], y + extent[:, 1]], axis=1),
        "dimensions": size * random.uniform(0.9, 1.1, (count, 3)),
        "location": location,
        "rotation_y": random.uniform(-3, 3, count),
    }
    truth["name"][:2] = "DontCare"
    chosen = random.choice(np.arange(2, count), 14)
    noise = random.random((14, 1)) * 0.08
    found = {
        "name": np.where(random.random(14) < 0.1, "Cyclist", names[chosen]),
        "alpha": truth["alpha"][chosen] + random.normal(0, 0.5, 14),
        "bbox": truth["bbox"][chosen] + random.normal(0, 40, (14, 4)) * noise,
        "dimensions": truth["dimensions"][chosen] * (1 + random.normal(0, 1, (14, 3)) * noise),
        "location": location[chosen] + random.normal(0, 1, (14, 3)) * noise,
        "rotation_y": truth["rotation_y"][chosen] + random.normal(0, 1, 14) * noise[:, 0],
        "score": random.random(14).round(2),
    }
    return truth, found


def objects(one):
    boxes = np.concatenate([one["location"], one["dimensions"], one["rotation_y"][:, None]], axis=1)
    rest = [one.get(key, np.zeros(0)) for key in ("truncated", "occluded", "score")]
    return Objects(one["name"], boxes, one["bbox"], one["alpha"], *rest)


def test_equals_mmdetection3d(tmp_path):
    truth, found = zip(*(scene(seed) for seed in range(5)), strict=True)
    (tmp_path / "in.pkl").write_bytes(pickle.dumps((truth, found)))
    script = Path(__file__).resolve().parents[1] / "helpers" / "kitti_reference.py"
    subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "in.pkl"), tmp_path / "o.npy"],
        check=True,
        capture_output=True,
    )
    expected = np.load(tmp_path / "o.npy")
    ours = kitti_ap([objects(one) for one in truth], [objects(one) for one in found], CLASSES)
    keys = product(
        ("AP11", "AP40"),
        ("2D", "BEV", "3D", "AOS"),
        CLASSES,
        ("easy", "moderate", "hard"),
        ("strict", "loose"),
    )
    got = [ours[f"{c}_{kind}_{points}_{d}_{s}"] for points, kind, c, d, s in keys]
    np.testing.assert_allclose(np.nan_to_num(got), expected.ravel(), atol=1e-6)
    assert (expected > 1).sum() > 40


def waymo_frame(places, points=10, scores=(), turn=0.0, name="Vehicle"):
    boxes = np.zeros((len(places), 7))
    boxes[:, 0], boxes[:, 3:6], boxes[:, 6] = places, (4.0, 2.0, 2.0), turn
    count = len(places)
    return Boxes(
        np.full(count, name), boxes, np.broadcast_to(points, count).astype(float), np.array(scores)
    )


def test_waymo_by_hand():
    # By score: a find, a false one, a find; two of three objects: 1/3 * 1 + 1/3 * 2/3.
    truth = waymo_frame([0, 20, 40])
    found = waymo_frame([0.2, 60, 20.2], scores=[0.9, 0.8, 0.7], turn=np.pi / 4)
    found.boxes[:, 6] = np.pi  # the same box, the other way round
    numbers = waymo_ap([truth], [found], ["Vehicle"])
    assert numbers["Vehicle/L1 mAP"] == pytest.approx(1 / 3 + 2 / 9)
    assert numbers["Vehicle/L1 mAPH"] == pytest.approx(0.0)
    found.boxes[:, 6] = 0.0
    assert waymo_ap([truth], [found], ["Vehicle"])["Overall/L2 mAPH"] == pytest.approx(5 / 9)


def test_waymo_levels():
    # Of 10, 3 and 0 points: level 1 has the first, level 2 two; finds of others do not count.
    truth = waymo_frame([0, 20, 40], points=[10, 3, 0])
    found = waymo_frame([0, 20, 40], scores=[0.7, 0.8, 0.9])
    numbers = waymo_ap([truth], [found], ["Vehicle", "Pedestrian"])
    assert numbers["Vehicle/L1 mAP"] == numbers["Vehicle/L2 mAP"] == 1.0
    assert np.isnan(numbers["Pedestrian/L1 mAP"]) and numbers["Overall/L1 mAP"] == 1.0
    missed = waymo_ap([truth], [waymo_frame([0], scores=[0.7])], ["Vehicle"])
    assert missed["Vehicle/L1 mAP"] == 1.0
    assert missed["Vehicle/L2 mAP"] == 0.5
    assert waymo_ap([truth], [waymo_frame([1.0], scores=[0.7])], ["Vehicle"], 0.5)[
        "Vehicle/L2 mAP"
    ] == pytest.approx(0.5)
