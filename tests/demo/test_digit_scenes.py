"""Digit scenes: what is written agrees with the pixels and with the settings."""

import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits

from polyfocal.commands import make_demo_data
from polyfocal.demo import DigitScenes, digit_scenes, write_digit_scenes
from polyfocal.demo.digit_scenes import render_scene
from polyfocal.errors import UserError

SMALL = DigitScenes(num_train=40, num_val=20, num_ood=20)


def annotations(root: Path, split: str) -> list[dict]:
    return json.loads((root / "annotations" / f"{split}.json").read_text())["annotations"]


def pictures(root: Path, split: str) -> dict[str, bytes]:
    return {
        file.name: np.asarray(Image.open(file)).tobytes()
        for file in sorted((root / "images" / split).iterdir())
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digit_scenes(tmp_path_factory.mktemp("digits") / "small", SMALL)


def test_layout(small: Path) -> None:
    files = {str(file.relative_to(small)) for file in small.rglob("*") if file.is_file()}
    assert files == (
        {"digit_scenes.json", "annotations/train.json", "annotations/val.json"}
        | {f"images/train/{i:06d}.png" for i in range(1, 41)}
        | {f"images/val/{i:06d}.png" for i in range(1, 21)}
    )
    assert list(small.parent.iterdir()) == [small]
    content = json.loads((small / "annotations" / "val.json").read_text())
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (i + 1, str(i)) for i in range(10)
    ]
    for image in content["images"]:
        assert Image.open(small / "images" / "val" / image["file_name"]).size == (160, 160)
        assert (image["width"], image["height"]) == (160, 160)


def test_boxes_and_areas_are_those_of_the_visible_masks(small: Path) -> None:
    by_image: dict[int, list[dict]] = {}
    for annotation in annotations(small, "train"):
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        assert annotation["area"] == mask.sum() > 0
        rows, columns = np.nonzero(mask)
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert annotation["iscrowd"] == 0
        by_image.setdefault(annotation["image_id"], []).append(mask)
    assert len(by_image) == 40
    for masks in by_image.values():
        assert np.sum(masks, axis=0).max() == 1  # a pixel belongs to one digit
        assert 1 <= len(masks) <= 5


def test_masks_are_the_digits_that_one_sees(small: Path) -> None:
    # Every digit has one colour, unlike the background: inside a mask, away from its soft edge, the
    # colour hardly varies, and it differs from the colour around the mask.
    for annotation in annotations(small, "val")[:40]:
        file = small / "images" / "val" / f"{annotation['image_id']:06d}.png"
        picture = np.asarray(Image.open(file)).astype(float)
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        padded = np.pad(mask, 1)
        core = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
        color = np.median(picture[core], axis=0)
        assert np.percentile(np.abs(picture[core] - color).max(1), 75) <= 60
        nothing = np.ones_like(mask)
        for other in annotations(small, "val"):
            if other["image_id"] == annotation["image_id"]:
                nothing &= coco_mask.decode(other["segmentation"]) == 0
        background = np.median(picture[nothing], axis=0)
        assert np.abs(color - background).max() > 40


def test_the_digits_are_of_the_named_class_and_splits_share_none(tmp_path: Path) -> None:
    root = write_digit_scenes(tmp_path / "set", replace(SMALL, spurious=0.5))
    targets = load_digits().target
    sources = {}
    for split in ("train", "val", "ood"):
        found = annotations(root, split)
        assert all(a["category_id"] == targets[a["source_digit"]] + 1 for a in found)
        sources[split] = {a["source_digit"] for a in found}
    assert not sources["train"] & sources["val"]
    assert not sources["train"] & sources["ood"]
    assert not sources["val"] & sources["ood"]


def test_deterministic_and_independent_of_the_count(small: Path, tmp_path: Path) -> None:
    more = write_digit_scenes(tmp_path / "more", replace(SMALL, num_train=45))
    first, second = pictures(small, "train"), pictures(more, "train")
    assert len(second) == 45
    assert first == {name: second[name] for name in first}
    count = len(annotations(small, "train"))
    assert annotations(more, "train")[:count] == annotations(small, "train")
    assert pictures(more, "val") == pictures(small, "val")
    other = write_digit_scenes(tmp_path / "other", replace(SMALL, seed=1))
    assert not set(pictures(other, "train").values()) & set(first.values())


def test_train_and_val_differ(small: Path) -> None:
    assert not set(pictures(small, "train").values()) & set(pictures(small, "val").values())


def test_label_noise_changes_labels_and_nothing_else(small: Path, tmp_path: Path) -> None:
    noisy = write_digit_scenes(tmp_path / "noisy", replace(SMALL, label_noise=0.3))
    assert pictures(noisy, "train") == pictures(small, "train")
    assert annotations(noisy, "val") == annotations(small, "val")
    clean, wrong = annotations(small, "train"), annotations(noisy, "train")
    changed = [(a, b) for a, b in zip(clean, wrong, strict=True) if a != b]
    for a, b in changed:
        assert b["true_category_id"] == a["category_id"] != b["category_id"]
        assert {**b, "category_id": a["category_id"]} == a
    # 0.3 of about 140: three standard deviations are 0.12.
    assert 0.18 < len(changed) / len(clean) < 0.42
    assert min(b["category_id"] for _, b in changed) >= 1
    assert max(b["category_id"] for _, b in changed) <= 10
    every = write_digit_scenes(tmp_path / "every", replace(SMALL, num_train=10, label_noise=1.0))
    assert all(a["category_id"] != a["true_category_id"] for a in annotations(every, "train"))


def test_long_tail() -> None:
    scenes = DigitScenes(long_tail=8.0)
    # Weights 8 ** (-i / 9): 1, 0.7937, 0.63, 0.5, ... 0.125; their sum is (1 - 1/10.079) / 0.2063.
    expected = 2.0 ** (-np.arange(10) / 3)
    np.testing.assert_allclose(scenes.class_probabilities("train"), expected / expected.sum())
    np.testing.assert_allclose(scenes.class_probabilities("val"), 0.1)
    np.testing.assert_allclose(scenes.class_probabilities("ood"), 0.1)
    drawn = Counter(
        instance.digit
        for index in range(60)
        for instance in render_scene(scenes, "train", index)[1]
    )
    assert drawn[0] + drawn[1] + drawn[2] > 2 * (drawn[7] + drawn[8] + drawn[9])


@pytest.mark.parametrize("cue", ["color", "background"])
def test_the_cue_agrees_as_often_as_asked(cue: str) -> None:
    scenes = DigitScenes(spurious=0.9, cue=cue)
    agreement, hue_errors = {}, []
    for split in ("train", "ood"):
        agree = []
        for index in range(60):
            picture, instances = render_scene(scenes, split, index)
            agree += [instance.cue == instance.digit for instance in instances]
            nothing = ~np.any([instance.mask for instance in instances], axis=0)
            for instance in instances:
                where = instance.mask if cue == "color" else nothing
                hue = _hue(np.median(picture[where], axis=0))
                hue_errors.append(abs((hue - instance.cue / 10 + 0.5) % 1 - 0.5))
        agreement[split] = np.mean(agree)
    assert 0.83 < agreement["train"] < 0.97
    assert agreement["ood"] < 0.3
    # What the file says is what the pixels show; the hue strays by 0.02, steps are of 0.1.
    assert np.mean(np.array(hue_errors) < 0.05) > 0.95


def _hue(color: np.ndarray) -> float:
    return (
        Image.new("RGB", (1, 1), tuple(int(v) for v in color)).convert("HSV").getpixel((0, 0))[0]
        / 255
    )


def test_the_cue_is_written_where_there_is_one(small: Path, tmp_path: Path) -> None:
    assert not any("cue_category_id" in a for a in annotations(small, "train"))
    root = write_digit_scenes(tmp_path / "cue", replace(SMALL, spurious=1.0))
    assert all(a["cue_category_id"] == a["category_id"] for a in annotations(root, "val"))
    assert any(a["cue_category_id"] != a["category_id"] for a in annotations(root, "ood"))


def test_overlap_is_bounded() -> None:
    covered = 0
    for overlap in (0.0, 1.0):
        scenes = DigitScenes(overlap=overlap, digits=(5, 8))
        for index in range(12):
            masks = [i.mask for i in render_scene(scenes, "train", index)[1]]
            boxes = [(*np.argwhere(m).min(0), *(np.argwhere(m).max(0) + 1)) for m in masks]
            for i, a in enumerate(boxes):
                for b in boxes[:i]:
                    height = min(a[2], b[2]) - max(a[0], b[0])
                    width = min(a[3], b[3]) - max(a[1], b[1])
                    meet = height > 0 and width > 0
                    assert overlap == 1.0 or not meet
                    covered += meet
    assert covered > 10


def test_size_of_digits() -> None:
    scenes = DigitScenes(size=320, digits=(1, 1), digit_size=(100, 100))
    heights = []
    for index in range(20):
        picture, (instance,) = render_scene(scenes, "train", index)
        assert picture.shape == (320, 320, 3)
        rows, columns = np.nonzero(instance.mask)
        heights.append(max(np.ptp(rows), np.ptp(columns)))
    assert 85 <= np.median(heights) <= 115


def test_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = DigitScenes(num_train=2, num_val=1)
    root = write_digit_scenes(tmp_path / "deep" / "set", tiny)
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    monkeypatch.setattr(digit_scenes, "render_scene", None)  # must not be asked again
    write_digit_scenes(root, tiny)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


def test_other_settings_need_overwrite(tmp_path: Path) -> None:
    tiny = DigitScenes(num_train=2, num_val=1)
    root = write_digit_scenes(tmp_path / "set", tiny)
    other = replace(tiny, seed=5)
    with pytest.raises(
        UserError, match=r"set holds digit scenes of other settings \(seed 0 there, "
    ):
        write_digit_scenes(root, other)
    before = pictures(root, "train")
    write_digit_scenes(root, other, overwrite=True)
    assert pictures(root, "train") != before
    assert json.loads((root / "digit_scenes.json").read_text())["settings"]["seed"] == 5
    assert list(tmp_path.iterdir()) == [root]


def test_a_damaged_set_is_written_anew(tmp_path: Path) -> None:
    tiny = DigitScenes(num_train=2, num_val=1)
    root = write_digit_scenes(tmp_path / "set", tiny)
    before = pictures(root, "train")
    (root / "images" / "train" / "000002.png").unlink()
    write_digit_scenes(root, tiny, overwrite=True)
    assert pictures(root, "train") == before and len(before) == 2


def test_what_to_do_about_other_settings_is_named(tmp_path: Path) -> None:
    """The command does what it says, here for the folder of --demo."""
    root = write_digit_scenes(tmp_path / "a set", DigitScenes(num_train=2))
    with pytest.raises(UserError) as caught:
        write_digit_scenes(root)
    assert str(caught.value) == (
        f"{root} holds digit scenes of other settings (num_train 2 there, 600 wanted): remove it, "
        f"give another folder, or replace it with `polyfocal make_demo_data '{root}' --overwrite` "
        "and your options."
    )
    _, _, *words = shlex.split(str(caught.value).split("`")[1])
    assert make_demo_data.main(words) == 0
    assert write_digit_scenes(root) == root and len(pictures(root, "train")) == 600


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "holiday.png").write_text("precious")
    with pytest.raises(UserError, match="holds no digit scenes"):
        write_digit_scenes(tmp_path, overwrite=overwrite)
    with pytest.raises(UserError, match="holds no digit scenes"):
        write_digit_scenes(tmp_path / "holiday.png", overwrite=overwrite)
    with pytest.raises(UserError, match=r"Cannot write digit scenes to .*holiday.png/set"):
        write_digit_scenes(tmp_path / "holiday.png" / "set", overwrite=overwrite)
    assert (tmp_path / "holiday.png").read_text() == "precious"


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = digit_scenes.render_scene, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(digit_scenes, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(tmp_path / "set", SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"seed": -1}, "seed of digit scenes must be a whole number of 0 or more, got -1"),
        ({"num_train": 0}, "num_train .* must be a whole number of 1 or more, got 0"),
        ({"size": 32}, "size .* must be a whole number of 64 pixels or more, got 32"),
        ({"digits": (3, 2)}, r"digits .* got \(3, 2\)"),
        ({"digit_size": (28, 150)}, r"largest <= 112 \(0.7 of size 160\), got \(28, 150\)"),
        ({"long_tail": 0.5}, "long_tail .* must be a ratio between 1 and 1e6, got 0.5"),
        ({"overlap": 1.5}, "overlap .* must be between 0 and 1, got 1.5"),
        ({"label_noise": float("nan")}, "label_noise .* must be between 0 and 1, got nan"),
        ({"spurious": -0.1}, "spurious .* must be between 0 and 1, got -0.1"),
        ({"seed": "a"}, "seed .* whole number of 0 or more, got 'a'"),
        ({"num_val": 2.5}, "num_val .* whole number of 1 or more, got 2.5"),
        ({"digits": 5}, "digits .* two whole numbers .* got 5"),
        ({"overlap": "x"}, "overlap .* must be a number, got 'x'"),
        ({"cue": "smell"}, "cue .* must be 'color' or 'background', got 'smell'"),
    ],
)
def test_settings_are_checked(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DigitScenes(**settings)


def test_the_color_cue_changes_colors_only(small: Path, tmp_path: Path) -> None:
    cued = write_digit_scenes(tmp_path / "cued", replace(SMALL, spurious=0.9))
    without = [
        {key: value for key, value in a.items() if key != "cue_category_id"}
        for a in annotations(cued, "train")
    ]
    assert without == annotations(small, "train")
    assert pictures(cued, "train") != pictures(small, "train")
