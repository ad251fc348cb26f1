"""The types of mistakes, by hand and against the authors' own code."""

import json

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")

from scenes import random_scenes

from polyfocal.calibration import tide
from polyfocal.calibration.tide import TYPES, mistakes
from polyfocal.coco import evaluate
from polyfocal.data.evaluation import truth_for


def written(tmp_path, content):
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    return file


def scene(objects, detections):
    names = ("cat", "dog")
    return (
        {
            "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 200}],
            "categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)],
            "annotations": [
                {
                    "id": n,
                    "image_id": 1,
                    "category_id": 1 + names.index(name),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                for n, (name, box) in enumerate(objects, start=1)
            ],
        },
        [
            {"image_id": 1, "category_id": 1 + names.index(name), "bbox": box, "score": score}
            for name, box, score in detections
        ],
    )


ONE = [0, 0, 40, 40]
HALF = [0, 0, 40, 16]  # IoU 0.4 with ONE
FAR = [150, 150, 20, 20]


@pytest.mark.parametrize(
    ("detections", "type_", "cost"),
    [
        # A cat at 0, 0. With nothing else, putting the detection right gives AP 1.
        ([("cat", HALF, 0.9)], "Loc", 1.0),
        ([("dog", ONE, 0.9)], "Cls", 1.0),
        ([("dog", HALF, 0.9)], "Both", 0.0),
        ([("cat", FAR, 0.9), ("cat", ONE, 0.8)], "Bkg", 0.5),
        ([("cat", [0, 0, 40, 38], 0.9), ("cat", ONE, 0.8)], "Dupe", 0.0),
    ],
)
def test_by_hand(tmp_path, detections, type_, cost):
    content, found = scene([("cat", ONE)], detections)
    result = mistakes(written(tmp_path, content), found)
    wrong = {name: number for name, number in result.count.items() if name != "Miss"}
    assert {name for name, number in wrong.items() if number} == {type_}
    assert result.count["Miss"] == (type_ == "Both"), "Loc and Cls would have found it"
    assert result.cost[type_] == pytest.approx(cost)


def test_missed_objects(tmp_path):
    content, found = scene([("cat", ONE), ("cat", FAR)], [("cat", ONE, 0.9)])
    result = mistakes(written(tmp_path, content), found)
    assert result.count["Miss"] == 1
    # Half of the objects at precision 1: recalls 0 to 0.5 of COCO's 101.
    assert result.ap == pytest.approx(51 / 101)
    assert result.cost["Miss"] == pytest.approx(50 / 101)


def test_of_two_that_could_find_an_object_one_does(tmp_path):
    content, found = scene([("cat", ONE)], [("cat", HALF, 0.6), ("cat", [0, 0, 16, 40], 0.9)])
    result = mistakes(written(tmp_path, content), found)
    assert result.count["Loc"] == 2
    assert result.cost["Loc"] == pytest.approx(1.0), "the other one goes"


def test_a_crowd_is_no_mistake(tmp_path):
    content, found = scene([("cat", ONE), ("cat", FAR)], [("cat", ONE, 0.5), ("cat", FAR, 0.9)])
    content["annotations"][1]["iscrowd"] = 1
    result = mistakes(written(tmp_path, content), found)
    assert result.ap == 1.0
    assert not any(result.count.values())


@pytest.mark.parametrize("seed", range(3))
def test_ap_is_cocoevals(tmp_path, seed):
    content, found = random_scenes(seed, crowds=True)
    truth = written(tmp_path, content)
    assert mistakes(truth, found).ap == pytest.approx(evaluate(truth, found).stats["mAP_50"])


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_authors_code(tmp_path, seed, monkeypatch):
    """On scenes where every class has objects: theirs counts one without as AP 0."""
    tidecv = pytest.importorskip("tidecv", reason="needs the authors' code: pip install tidecv")
    # COCO's recalls are multiples of 0.01, theirs are whole numbers over 100: not the same floats.
    monkeypatch.setattr(tide, "_RECALLS", np.arange(101) / 100)
    content, found = random_scenes(seed, pictures=20, ties=False)
    found = [one for one in found if one["category_id"] < 4]
    content["categories"] = content["categories"][:3]
    result = mistakes(written(tmp_path, content), found)
    truth, data = tidecv.Data("truth"), tidecv.Data("found")
    for category in content["categories"]:
        truth.add_class(category["id"], category["name"])
    for image in content["images"]:
        truth.add_image(image["id"], image["file_name"])
    for one in content["annotations"]:
        truth.add_ground_truth(one["image_id"], one["category_id"], one["bbox"])
    for one in found:
        data.add_detection(one["image_id"], one["category_id"], one["score"], one["bbox"])
    theirs = tidecv.TIDE()
    run = theirs.evaluate(truth, data, mode=tidecv.TIDE.BOX)
    assert 100 * result.ap == pytest.approx(run.ap, abs=1e-6)
    names = {error.short_name: error for error in theirs._error_types}
    assert set(names) == set(TYPES)
    for name, error in names.items():
        assert result.count[name] == len(run.error_dict[error]), name
    costs = theirs.get_main_errors()["found"]
    for name, value in costs.items():
        # Theirs are never below 0.
        assert max(100 * result.cost[name], 0.0) == pytest.approx(value, abs=1e-6), name
    special = theirs.get_special_errors()["found"]
    assert 100 * result.false_positives == pytest.approx(special["FalsePos"], abs=1e-6)
    assert 100 * result.false_negatives == pytest.approx(special["FalseNeg"], abs=1e-6)


def test_masks(tmp_path):
    """Of rectangles as polygons and their run lengths: the same as their boxes."""
    from pycocotools import mask as coco_mask

    content, found = random_scenes(0, ties=False)
    found = [
        {**one, "bbox": [float(round(v)) for v in one["bbox"]]}
        for one in found
        if min(one["bbox"][:2]) >= 0
    ]

    def polygon(box):
        x, y, w, h = box
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]

    for one in content["annotations"]:
        one["segmentation"] = polygon(one["bbox"])
    masks = []
    for one in found:
        (code,) = coco_mask.frPyObjects(polygon(one["bbox"]), 100, 100)
        masks.append({**one, "segmentation": {**code, "counts": code["counts"].decode()}})
    truth = written(tmp_path, content)
    by_mask, by_box = mistakes(truth, masks, "segm"), mistakes(truth, found)
    assert sum(abs(by_mask.count[n] - by_box.count[n]) for n in TYPES) <= 4
    assert by_mask.ap == pytest.approx(by_box.ap, abs=0.05)


def test_an_object_of_two_classes_is_two_objects_however_often_it_is_counted(tmp_path):
    truth, found = scene([("cat", ONE)], [("cat", ONE, 0.9), ("dog", ONE, 0.8)])
    truth["annotations"][0]["category_ids"] = [1, 2]
    file = written(tmp_path, truth)
    once = truth_for(file, "bbox")
    assert len(once.objects) == len(truth_for(once, "bbox").objects) == 2
    for against in (file, once):
        assert evaluate(against, found).stats["mAP"] == pytest.approx(1.0)
        assert mistakes(against, found).count == dict.fromkeys(TYPES, 0)
