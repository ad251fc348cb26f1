"""Bootstrap intervals of AP: the number of COCOeval, on any draw of pictures, and its spread."""

import json

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")

from scenes import random_scenes

from polyfocal.calibration import match
from polyfocal.coco import evaluate
from polyfocal.errors import UserError
from polyfocal.experiments import intervals
from polyfocal.experiments.intervals import ap_intervals


def written(tmp_path, content, name="truth.json"):
    file = tmp_path / name
    file.write_text(json.dumps(content))
    return file


def measured(truth, content, found, weight):
    """AP of each class where each picture counts as often as its weight says."""
    matched = match(truth, found, intervals.THRESHOLDS.tolist())
    places = {image["id"]: row for row, image in enumerate(content["images"])}
    picture = np.array([places[found[row]["image_id"]] for row in matched.index])
    objects = np.zeros((len(places), len(content["categories"])))
    for one in content["annotations"]:
        if not one["iscrowd"]:
            objects[places[one["image_id"]], one["category_id"] - 1] += 1
    return intervals._Run(matched, picture).measure(weight, weight @ objects)


@pytest.mark.parametrize("seed", range(4))
def test_the_split_as_it_is_has_cocoevals_ap(tmp_path, seed):
    content, found = random_scenes(seed, crowds=seed % 2 == 1)
    truth = written(tmp_path, content)
    expected = evaluate(truth, found)
    result = ap_intervals(truth, [found], draws=100)
    assert result.mean.value == pytest.approx(expected.stats["mAP"], abs=1e-9)
    for name, value in expected.per_class.items():
        assert result.classes[name].value == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert result.mean.low <= result.mean.value <= result.mean.high


@pytest.mark.parametrize("seed", range(3))
def test_a_draw_has_cocoevals_ap_of_the_pictures_in_it(tmp_path, seed):
    """Without ties, of which COCOeval takes the first pictures' first."""
    content, found = random_scenes(seed, ties=False)
    truth = written(tmp_path, content)
    count = len(content["images"])
    weight = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count))
    drawn, copies = {**content, "images": [], "annotations": []}, []
    for image, times in zip(content["images"], weight.tolist(), strict=True):
        for time in range(times):
            new = 1000 * (time + 1) + image["id"]
            drawn["images"].append({**image, "id": new})
            for one in content["annotations"]:
                if one["image_id"] == image["id"]:
                    number = len(drawn["annotations"]) + 1
                    drawn["annotations"].append({**one, "image_id": new, "id": number})
            copies += [{**one, "image_id": new} for one in found if one["image_id"] == image["id"]]
    expected = evaluate(written(tmp_path, drawn, "drawn.json"), copies)
    by_class = measured(truth, content, found, weight)
    # Copies of a picture have equal scores: COCOeval takes them one after the other, so that its
    # precision between two copies of a right detection is that of half of them.
    for value, name in zip(by_class, expected.per_class, strict=True):
        assert value == pytest.approx(expected.per_class[name], abs=0.02, nan_ok=True), name


@pytest.mark.parametrize("seed", range(6))
def test_a_draw_without_some_pictures_has_cocoevals_ap_of_the_others(tmp_path, seed):
    """Also where the best detections of a class are in a picture that was not drawn."""
    content, found = random_scenes(seed, ties=False, crowds=seed % 2 == 1)
    weight = np.random.default_rng(seed).integers(2, size=len(content["images"]))
    drawn = {one["id"] for one, w in zip(content["images"], weight, strict=True) if w}
    part = {
        **content,
        "images": [one for one in content["images"] if one["id"] in drawn],
        "annotations": [one for one in content["annotations"] if one["image_id"] in drawn],
    }
    kept = [one for one in found if one["image_id"] in drawn]
    expected = evaluate(written(tmp_path, part, "part.json"), kept)
    by_class = measured(written(tmp_path, content), content, found, weight)
    for value, name in zip(by_class, expected.per_class, strict=True):
        assert value == pytest.approx(expected.per_class[name], abs=1e-9, nan_ok=True), name


def test_a_run_does_not_differ_from_itself(tmp_path):
    content, found = random_scenes(0)
    result = ap_intervals(written(tmp_path, content), [found], [found], draws=100)
    assert result.mean == (0, 0, 0) and not result.mean.clear


def test_a_better_run_is_told_apart_and_the_pairing_helps(tmp_path):
    content, found = random_scenes(1, pictures=60)
    truth = written(tmp_path, content)
    # The same detections, all of them a little off.
    worse = [{**one, "bbox": [one["bbox"][0] + 2, *one["bbox"][1:]]} for one in found]
    difference = ap_intervals(truth, [found], [worse], draws=200)
    assert difference.mean.value > 0 and difference.mean.clear
    alone = ap_intervals(truth, [found], draws=200)
    spread = alone.mean.high - alone.mean.low
    assert difference.mean.high - difference.mean.low < spread
    back = ap_intervals(truth, [worse], [found], draws=200)
    assert back.mean.value == pytest.approx(-difference.mean.value)


def test_seeds_are_averaged(tmp_path):
    content, found = random_scenes(2)
    truth = written(tmp_path, content)
    other = found[: len(found) // 2]
    values = [ap_intervals(truth, [one], draws=100).mean.value for one in (found, other)]
    both = ap_intervals(truth, [found, other], draws=100)
    assert both.mean.value == pytest.approx(np.mean(values))
    assert ap_intervals(truth, [found, other], draws=100).mean == both.mean, "the same draws"


def test_the_interval_covers_what_it_says(tmp_path):
    """Of 40 splits drawn from one population, about 90 % of the 90 % intervals hold its AP."""
    content, found = random_scenes(3, pictures=400, ties=False)
    whole = evaluate(written(tmp_path, content), found).stats["mAP"]
    rng = np.random.default_rng(0)
    held = 0
    for number in range(40):
        chosen = set(rng.choice([one["id"] for one in content["images"]], 60).tolist())
        part = {
            **content,
            "images": [one for one in content["images"] if one["id"] in chosen],
            "annotations": [one for one in content["annotations"] if one["image_id"] in chosen],
        }
        kept = [one for one in found if one["image_id"] in chosen]
        result = ap_intervals(
            written(tmp_path, part, f"{number}.json"), [kept], draws=100, level=0.9
        )
        held += result.mean.low <= whole <= result.mean.high
    assert 33 <= held <= 40


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(draws=5), "draws=5: expected 100 or more"),
        (dict(level=1.0), "level=1.0"),
        (dict(against=[[], []]), "got 1 results against 2: runs are paired"),
    ],
)
def test_refuses(tmp_path, settings, sentence):
    content, found = random_scenes(0)
    with pytest.raises(UserError, match=sentence):
        ap_intervals(written(tmp_path, content), [found], **settings)
