"""Matching against COCOeval; D-ECE against netcal's values; the rest worked out by hand."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polyfocal.calibration import DetectionCalibration, match
from polyfocal.errors import UserError

SIDE = 100


def loaded(truth):
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def rectangle(x, y, w, h):
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return coco_mask.encode(mask)


def ground_truth(objects, pictures=1, categories=2):
    """Objects as (picture, category, box) or (picture, category, box, crowd)."""
    return loaded(
        {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE}
                for i in range(pictures)
            ],
            "categories": [{"id": 3 * c + 1, "name": f"c{c}"} for c in range(categories)],
            "annotations": [
                {
                    "id": number + 1,
                    "image_id": picture,
                    "category_id": 3 * category + 1,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": int(any(crowd)),
                    "segmentation": rectangle(*box),
                }
                for number, (picture, category, box, *crowd) in enumerate(objects)
            ],
        }
    )


def results(*detections):
    """Detections as (picture, category, box, score)."""
    return [
        {
            "image_id": picture,
            "category_id": 3 * category + 1,
            "bbox": list(box),
            "score": score,
            "segmentation": rectangle(*box),
        }
        for picture, category, box, score in detections
    ]


def measure(truth, found, **settings):
    metric = DetectionCalibration(**settings)
    metric.update(truth, found)
    return metric.compute()


def random_case(seed):
    """Boxes on a coarse grid and few scores: ties of scores and of IoU are common."""
    rng = np.random.default_rng(seed)

    def box():
        return tuple(int(v) for v in (*rng.integers(0, 7, 2) * 10, *rng.integers(1, 4, 2) * 10))

    objects = [
        (int(rng.integers(6)), int(rng.integers(2)), box(), rng.random() < 0.2) for _ in range(60)
    ]
    found = [
        (int(rng.integers(6)), int(rng.integers(3)), box(), float(rng.integers(0, 11)) / 10)
        for _ in range(300)
    ]
    return ground_truth(objects, pictures=6, categories=3), results(*found)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("max_dets", [100, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matches_as_cocoeval(seed, max_dets, iou_type):
    truth, found = random_case(seed)
    thresholds = [0.1, 1 / 3, 0.5, 1.0]
    ours = match(truth, found, thresholds, iou_type, max_dets)

    shape = "bbox" if iou_type == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", shape)
    with contextlib.redirect_stdout(io.StringIO()):
        detected = truth.loadRes([{key: one[key] for key in keys} for one in found])
        evaluation = COCOeval(truth, detected, iou_type)
        evaluation.params.iouThrs = np.array(thresholds)
        evaluation.params.maxDets = [max_dets]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
    right, ignored = {}, {}
    for one in evaluation.evalImgs:
        if one is None:
            continue
        for column, id_ in enumerate(one["dtIds"]):
            wrong = (one["dtMatches"][:, column] == 0) | (one["dtIgnore"][:, column] == 1)
            right[id_ - 1] = (~wrong).tolist()
            ignored[id_ - 1] = (one["dtIgnore"][:, column] == 1).tolist()
    assert sorted(ours.index) == sorted(right)
    assert max_dets == 100 or len(ours.index) < len(found)
    for column, threshold in enumerate(thresholds):
        matches = ours.matches[threshold]
        assert matches.right.tolist() == [right[i][column] for i in ours.index]
        assert matches.ignored.tolist() == [ignored[i][column] for i in ours.index]
        assert threshold > 0.4 or (matches.right.any() and matches.ignored.any())
    assert ours.num_objects.sum() == sum(not a["iscrowd"] for a in truth.dataset["annotations"])


def test_the_iou_of_a_match_and_the_last_of_equals():
    # Both objects overlap the first detection by the same IoU; it takes the later one, which leaves
    # the earlier one, that the second detection meets exactly.
    truth = ground_truth([(0, 0, (0, 0, 10, 10)), (0, 0, (10, 0, 10, 10))])
    found = results((0, 0, (5, 0, 10, 10), 0.9), (0, 0, (0, 0, 10, 10), 0.8))
    ours = match(truth, found, [0.1])
    assert ours.matches[0.1].iou.tolist() == pytest.approx([1 / 3, 1.0])


def test_nothing_overlaps_at_threshold_0():
    truth = ground_truth([(0, 0, (0, 0, 10, 10))])
    found = results((0, 0, (50, 50, 10, 10), 0.9), (0, 0, (9, 9, 10, 10), 0.8))
    # COCOeval would give the object to the first detection, which does not touch it.
    assert match(truth, found, [0.0]).matches[0.0].right.tolist() == [False, True]


# Recorded once from netcal 1.4.0: ECE(bins, detection=True) on the scores alone, and on scores,
# centre, width and height with 5 bins each, of the cases that random_case draws.
NETCAL = {
    0: (0.4675862068965516, 0.49379310344827587),
    1: (0.49379310344827576, 0.50482758620689655),
    2: (0.46293706293706294, 0.4825174825174825),
}


@pytest.mark.parametrize("seed", NETCAL)
def test_d_ece_equals_netcal(seed):
    result = measure(*random_case(seed))
    assert (result.d_ece, result.d_ece_box) == pytest.approx(NETCAL[seed], abs=1e-12)


def test_degenerate_inputs():
    one_object = [(0, 0, (10, 10, 20, 20))]
    nothing = measure(ground_truth([]), [])
    assert all(math.isnan(value) for value in nothing.stats.values())

    no_detections = measure(ground_truth(one_object), [])
    assert no_detections.lrp == no_detections.olrp == 1
    assert math.isnan(no_detections.d_ece) and math.isnan(no_detections.la_ece)

    # netcal: the mean score, all being wrong. Without objects there is no class to measure.
    no_objects = measure(ground_truth([]), results((0, 0, (1, 1, 5, 5), 0.75)))
    assert no_objects.d_ece == no_objects.d_ece_box == 0.75
    assert math.isnan(no_objects.la_ece) and math.isnan(no_objects.lrp)

    # One bin: the gap of the means. Scores of 0 and 1 are in the first and last bins.
    found = results((0, 0, (10, 10, 20, 20), 1.0), (0, 1, (10, 10, 20, 20), 0.0))
    sure = measure(ground_truth(one_object), found)
    assert sure.d_ece == sure.d_ece_box == 0 and sure.bins.count.tolist() == [1] + [0] * 8 + [1]
    wrong = results((0, 0, (60, 10, 20, 20), 1.0), (0, 0, (10, 10, 20, 20), 0.0))
    assert measure(ground_truth(one_object), wrong).d_ece == 1
    assert measure(ground_truth(one_object), wrong, num_bins=1).d_ece == 0


def test_by_hand():
    # Category c0 has two objects. Its detections: exact with score 0.9; shifted by half a side,
    # IoU 1/3, with 0.7; nothing there with 0.4. Category c1 has one object and a wrong detection of
    # score 0.5, and c2 has a detection but no object, so that it has no part in any class's mean.
    truth = ground_truth(
        [(0, 0, (0, 0, 20, 20)), (0, 0, (40, 0, 20, 20)), (0, 1, (0, 40, 20, 20))], categories=3
    )
    found = results(
        (0, 0, (0, 0, 20, 20), 0.9),
        (0, 0, (50, 0, 20, 20), 0.7),
        (0, 0, (70, 70, 20, 20), 0.4),
        (0, 1, (70, 70, 20, 20), 0.5),
        (0, 2, (70, 70, 20, 20), 0.2),
    )
    result = measure(truth, found)
    # Right at IoU 0.5: the first alone. The bins hold one detection each.
    assert result.d_ece == pytest.approx((0.1 + 0.7 + 0.4 + 0.5 + 0.2) / 5)
    # Right at 0.1 and 0: the first, IoU 1, and the second, IoU 1/3.
    c0 = (0.1 + (0.7 - 1 / 3) + 0.4) / 3
    assert result.classes["c0"].la_ece == pytest.approx(c0)
    assert result.la_ece == result.la_ece_0 == pytest.approx((c0 + 0.5) / 2)
    assert result.la_ace_0 == pytest.approx((c0 + 0.5) / 2)
    # LRP of c0: 1 right of IoU 1, 2 wrong, 1 missed; at the best threshold only 1 missed.
    assert result.classes["c0"].lrp == pytest.approx(3 / 4)
    assert result.classes["c0"].olrp == pytest.approx(1 / 2)
    assert result.classes["c0"].threshold == 0.9
    assert result.classes["c1"].lrp == result.classes["c1"].olrp == 1
    assert math.isnan(result.classes["c1"].threshold)
    assert result.lrp == pytest.approx((3 / 4 + 1) / 2)
    assert result.olrp == pytest.approx((1 / 2 + 1) / 2)
    assert math.isnan(result.classes["c2"].lrp) and math.isnan(result.classes["c2"].la_ece)


def test_lrp_weighs_the_location():
    # IoU 16/20 of one object, none missed: (1 - 0.8) / (1 - 0.5) / 1.
    truth = ground_truth([(0, 0, (0, 0, 20, 20))])
    result = measure(truth, results((0, 0, (0, 0, 20, 16), 0.6)))
    assert result.lrp == result.olrp == pytest.approx(0.4)


def test_perfect_boxes_have_no_error():
    # The IoU of a box with itself is above 1 by rounding for some numbers.
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.1, 40, (300, 4)).tolist()
    truth = ground_truth([(n % 100, 0, (0, 0, 10, 10)) for n in range(300)], pictures=100)
    found = results(*[(n % 100, 0, (0, 0, 10, 10), 1.0) for n in range(300)])
    for annotation, detection, box in zip(truth.dataset["annotations"], found, boxes, strict=True):
        annotation["bbox"] = detection["bbox"] = box
    ours = match(truth, found, [0.0, 0.1, 0.5])
    assert all(matches.iou.max() == 1.0 for matches in ours.matches.values())
    result = measure(truth, found)
    for value in result.stats.values():
        assert 0 <= value <= 1e-12, result.stats
    # At the threshold itself the location costs all of 1 and no more.
    at = ground_truth([(n, 0, (0, 0, 10, 10)) for n in range(30)], pictures=30)
    half = results(*[(n, 0, (0, 0, 10, 9), 0.5) for n in range(30)])
    assert (
        measure(at, half, iou=0.9).lrp == pytest.approx(1.0) and measure(at, half, iou=0.9).lrp <= 1
    )


def test_scores_that_rounding_put_beside_the_unit_interval():
    truth = ground_truth([(0, 0, (0, 0, 20, 20))])
    result = measure(truth, results((0, 0, (0, 0, 20, 20), 1 + 2**-23)))
    assert result.d_ece == result.la_ece == 0
    result = measure(truth, results((0, 0, (0, 0, 20, 20), np.float32(-(2.0**-24)))))
    assert result.d_ece == 1


def test_tied_scores_stand_or_fall_together():
    # Right ones first among equals: cut after the first, which no threshold does, would be 0.5.
    truth = ground_truth([(0, 0, (0, 0, 20, 20)), (0, 0, (40, 40, 20, 20))])
    found = results((0, 0, (0, 0, 20, 20), 0.8), (0, 0, (70, 0, 20, 20), 0.8))
    result = measure(truth, found)
    assert result.olrp == result.lrp == pytest.approx(2 / 3)
    assert measure(truth, found[::-1]).olrp == result.olrp


def test_bins_of_laece_are_closed_on_the_right():
    # 0.04 belongs to (0, 0.04], 0.05 to (0.04, 0.08], 0 to the first: no two errors cancel but
    # those of 0 and 0.04, whose means are 0.02 and (1 + 0) / 2.
    truth = ground_truth([(0, 0, (0, 0, 20, 20))])
    found = results(
        (0, 0, (0, 0, 20, 20), 0.04),
        (0, 0, (60, 60, 20, 20), 0.0),
        (0, 0, (60, 60, 20, 20), 0.05),
    )
    result = measure(truth, found)
    assert result.classes["c0"].bins.count[:3].tolist() == [2, 1, 0]
    assert result.la_ece == pytest.approx((2 * (0.5 - 0.02) + 0.05) / 3)
    assert result.la_ace_0 == pytest.approx((0.96 + 0.0 + 0.05) / 3)


def test_a_class_without_error_counts_in_the_mean():
    truth = ground_truth([(0, 0, (0, 0, 20, 20)), (0, 1, (0, 0, 20, 20))])
    found = results((0, 0, (0, 0, 20, 20), 1.0), (0, 1, (60, 60, 20, 20), 0.5))
    result = measure(truth, found)
    assert result.classes["c0"].la_ece == 0 and result.la_ece == pytest.approx(0.25)


def test_crowds_are_left_out():
    truth = ground_truth([(0, 0, (0, 0, 20, 20)), (0, 0, (50, 50, 40, 40), True)])
    found = results((0, 0, (0, 0, 20, 20), 1.0), (0, 0, (60, 60, 10, 10), 0.9))
    result = measure(truth, found)
    assert result.d_ece == result.la_ece == result.la_ace_0 == result.lrp == 0
    assert result.classes["c0"].num_objects == result.classes["c0"].num_detections == 1


def test_parts_merge_to_the_whole():
    truth, found = random_case(5)
    whole = measure(truth, found)

    def part(pictures):
        chosen = {
            key: [one for one in truth.dataset[key] if one[id_] in pictures]
            for key, id_ in (("images", "id"), ("annotations", "image_id"))
        }
        metric = DetectionCalibration()
        metric.update(
            loaded({**truth.dataset, **chosen}), [d for d in found if d["image_id"] in pictures]
        )
        return metric

    first = part({0, 1})
    first.merge(part({2, 3, 4, 5}))
    assert first.compute().stats == pytest.approx(whole.stats, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_id": 9}, "detection 1 of the results has image_id 9, not declared in"),
        ({"category_id": 2}, "detection 1 of the results has category_id 2, not declared in"),
        ({"score": 1.5}, r"has score 1.5; calibration needs a probability in \[0, 1\]"),
        ({"score": -0.1}, r"has score -0.1; calibration needs a probability in \[0, 1\]"),
        ({"score": math.nan}, "has score nan; it must be a finite number"),
        ({"bbox": [0, math.nan, 1, 1]}, "has bbox .*nan.*; it must be 4 numbers"),
    ],
)
def test_bad_input(change, sentence, tmp_path):
    truth = ground_truth([(0, 0, (0, 0, 20, 20))])
    found = results((0, 0, (0, 0, 20, 20), 0.5), (0, 0, (0, 0, 20, 20), 0.5))
    found[1].update(change)
    with pytest.raises(UserError, match=sentence):
        measure(truth, found)


def test_bad_use():
    with pytest.raises(UserError, match=r"iou must be between 0 and 1, got 1.5"):
        DetectionCalibration(iou=1.5)
    with pytest.raises(UserError, match="num_class_bins|num_bins"):
        DetectionCalibration(num_class_bins=0)
    metric = DetectionCalibration()
    with pytest.raises(UserError, match="no pictures yet"):
        metric.compute()
    metric.update(ground_truth([]), [])
    with pytest.raises(UserError, match="the categories are"):
        metric.update(ground_truth([], categories=3), [])
    with pytest.raises(UserError, match="measured at IoU 0.5 and the other at 0.75"):
        metric.merge(DetectionCalibration(iou=0.75))


def test_reads_files(tmp_path):
    truth = ground_truth([(0, 0, (0, 0, 20, 20))])
    for one in truth.dataset["annotations"]:
        del one["segmentation"]
    (tmp_path / "truth.json").write_text(json.dumps(truth.dataset))
    box = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 20, 20], "score": 0.5}
    (tmp_path / "found.json").write_text(json.dumps([box]))
    assert measure(tmp_path / "truth.json", str(tmp_path / "found.json")).d_ece == 0.5
