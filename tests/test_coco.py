"""COCO folders: what is found, what is refused in which words, and COCOeval's numbers."""

import contextlib
import copy
import io
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from polyfocal.calibration import DetectionCalibration
from polyfocal.coco import (
    DatasetError,
    evaluate,
    format_table,
    load_split,
)
from polyfocal.data import annotations
from polyfocal.data.masks import is_compressed_rle
from polyfocal.demo import DigitScenes, write_digit_scenes

PYCOCOTOOLS_ORDER = "mAP mAP_50 mAP_75 mAP_s mAP_m mAP_l AR@1 AR@10 AR@100 AR_s AR_m AR_l"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digit scenes; not to be changed."""
    return write_digit_scenes(
        tmp_path_factory.mktemp("digits") / "set", DigitScenes(num_train=12, num_val=24)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, three objects (one crowd), two categories; free to be changed."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        picture = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / name)
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    common = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": [square]}
    write(
        tmp_path,
        {
            "images": [
                {"id": 1, "file_name": "a.png", "width": 80, "height": 60},
                {"id": 2, "file_name": "b.jpg", "width": 80, "height": 60},
            ],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 7, "iscrowd": 0, **common},
                {"id": 2, "image_id": 1, "category_id": 3, "iscrowd": 0, **common},
                {"id": 3, "image_id": 2, "category_id": 3, "iscrowd": 1, **common},
            ],
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        },
    )
    return tmp_path


def write(folder: Path, content: object, name: str = "train.json") -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / name).write_text(json.dumps(content))


def read(folder: Path) -> dict:
    return json.loads((folder / "annotations" / "train.json").read_text())


# --- load_split -------------------------------------------------------------------------------


def test_a_sound_split_is_described(folder: Path) -> None:
    split = load_split(folder, "train")
    assert split.annotation_file == folder / "annotations" / "train.json"
    assert split.image_dir == folder / "images"
    assert split.classes == ("cat", "dog")
    assert split.category_ids == (7, 3)
    assert (split.num_images, split.num_annotations, split.max_instances) == (2, 3, 2)
    assert split.has_masks and split.mask_problem == ""


def test_digit_scenes_are_sound(digits: Path) -> None:
    train, val = load_split(digits, "train"), load_split(digits, "val")
    assert (train.num_images, val.num_images) == (12, 24)
    assert train.image_dir == digits / "images" / "train"
    assert val.image_dir == digits / "images" / "val"
    assert val.has_masks and val.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("place", "file_name"),
    [
        ("images/train", "a.png"),
        ("images/train2017", "a.png"),
        ("train2017", "a.png"),
        ("train", "a.png"),
        ("images", "train/a.png"),
        (".", "images/train/a.png"),
        ("some/where/else", "a.png"),
        ("some/where", "else/a.png"),
    ],
)
def test_pictures_are_found(folder: Path, place: str, file_name: str) -> None:
    content = read(folder)
    content["images"] = content["images"][:1]
    content["images"][0]["file_name"] = file_name
    content["annotations"] = content["annotations"][:2]
    write(folder, content)
    (folder / place / file_name).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / "images" / "a.png", folder / place / file_name)
    assert load_split(folder, "train").image_dir == folder / place


def test_coco_2017_names_are_found(folder: Path) -> None:
    annotations = folder / "annotations"
    (annotations / "train.json").rename(annotations / "instances_train2017.json")
    assert load_split(folder, "train").annotation_file.name == "instances_train2017.json"


def test_pictures_of_another_split_are_not_taken(folder: Path) -> None:
    (folder / "images").rename(folder / "Val")
    with pytest.raises(DatasetError, match=r"'a.png' was looked for in images/train, "):
        load_split(folder, "train")


@pytest.mark.parametrize("places", ["train_images val_images", "Train Val", "set/Val2 set/Train2"])
def test_of_two_places_the_one_named_after_the_split_is_taken(folder: Path, places: str) -> None:
    (folder / "annotations/val.json").write_text(json.dumps(read(folder)))
    first, second = (folder / place for place in places.split())
    (folder / "images").rename(folder / "pictures")
    shutil.copytree(folder / "pictures", first)
    first.parent.mkdir(exist_ok=True)
    (folder / "pictures").rename(second)
    for split in ("train", "val"):
        (wanted,) = (place for place in (first, second) if split in place.name.lower())
        assert load_split(folder, split).image_dir == wanted


def test_two_places_that_may_both_be_meant_are_refused(folder: Path) -> None:
    (folder / "images").rename(folder / "b")
    shutil.copytree(folder / "b", folder / "a")
    sentence = "{0}/annotations/train.json are in {0}/a and in {0}/b, .* into {0}/images/train[.]"
    with pytest.raises(DatasetError, match=sentence.format(re.escape(str(folder)))):
        load_split(folder, "train")
    (folder / "a" / "b.jpg").unlink()  # b has more of the pictures
    assert load_split(folder, "train").image_dir == folder / "b"


@pytest.mark.parametrize(
    ("place", "taken"),
    [
        ("train_images", False),
        ("TrainImages", False),
        ("training", False),
        ("trainimages/a", False),
        ("test-1", False),
        ("train_val", True),
        ("trains", True),  # of railways
        ("tester", True),
        ("contest", True),
    ],
)
def test_a_single_place_named_after_another_split(folder: Path, place: str, taken: bool) -> None:
    write(folder, read(folder), "val.json")
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / "images").rename(folder / place)
    if taken:
        assert load_split(folder, "val").image_dir == folder / place
    else:
        with pytest.raises(DatasetError, match="folder there that is not named after another spl"):
            load_split(folder, "val")


def test_pictures_that_two_splits_share_are_counted(folder: Path) -> None:
    """Over links of both kinds, and under other names: one of val's three is its own."""
    content = read(folder)
    places = folder / "images" / "val"
    places.mkdir()
    (places / "c.png").symlink_to(folder / "images" / "a.png")
    (places / "d.jpg").hardlink_to(folder / "images" / "b.jpg")
    shutil.copy(folder / "images" / "a.png", places / "e.png")
    for image, name in zip(content["images"], ("c.png", "d.jpg"), strict=True):
        image["file_name"] = name
    content["images"].append({**content["images"][0], "id": 3, "file_name": "e.png"})
    write(folder, content, "val.json")
    train, val = (load_split(folder, split) for split in ("train", "val"))
    sentence = "2 pictures are in train and in val: scores on val mean little."
    assert train.shared_with(val) == [sentence]
    content["images"] = content["images"][2:]
    content["annotations"] = [{**content["annotations"][0], "image_id": 3}]
    write(folder, content, "val.json")
    assert train.shared_with(load_split(folder, "val")) == []


def test_pictures_behind_a_link_are_found(folder: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "images").rename(elsewhere / "pictures")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    assert load_split(folder, "train").image_dir == folder / "linked" / "pictures"


def _set(kind: str, index: int, **values: object):
    def change(content: dict) -> None:
        content[kind][index].update(values)

    return change


def _drop(kind: str, index: int, key: str):
    return lambda content: content[kind][index].pop(key)


def _all_crowd(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def _two_bad_categories(content: dict) -> None:
    for annotation in content["annotations"][:2]:
        annotation["category_id"] = 99


def _thin(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation.update(bbox=[1, 1, 0, 5], area=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("images"), "has no 'images'"),
        (lambda c: c.update(categories={}), "'categories' of .* must be a list, got an object"),
        (lambda c: c["annotations"].append(5), "entry 3 of 'annotations' .* object, got a number"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "lists no pictures"),
        (lambda c: c["annotations"].clear(), "has no annotations"),
        (lambda c: c["categories"].clear(), "declares no categories"),
        (_all_crowd, r"all 3 annotations .* are crowd"),
        (_thin, r"all 2 annotated objects .* a box of less than one pixel"),
        (
            _two_bad_categories,
            r"annotation 1 of .*train.json has category_id 99, which is not among the declared "
            r"categories \(3, 7\) \(2 such\)\.",
        ),
        (
            _set("annotations", 2, image_id=5),
            r"annotation 3 of .* has image_id 5, which is not among the declared pictures \(1, 2\)",
        ),
        (_set("images", 1, id=1), r"declares image id 1 2 times"),
        (_set("annotations", 1, id=1), r"declares annotation id 1 2 times"),
        (_set("categories", 1, id=7), r"declares category id 7 2 times"),
        (_set("categories", 1, name="cat"), r"declares category name 'cat' 2 times"),
        (_drop("categories", 1, "name"), r"category 3 of .* has no name"),
        (_set("annotations", 0, id="x"), r"annotation no. 0 of .* has id 'x'; it must be a whole"),
        (_set("annotations", 1, bbox=[1, 2, 3]), r"annotation 2 of .* has bbox \[1, 2, 3\]; .* 4"),
        (_set("annotations", 1, bbox=[1, 2, math.nan, 4]), r"has bbox \[1, 2, nan, 4\]"),
        (_set("annotations", 1, bbox=[1, 2, -3, 4]), r"has bbox \[1, 2, -3, 4\]; .* width >= 0"),
        (_set("annotations", 1, bbox=[10**400, 1, 1, 1]), r"has bbox \[1000"),
        (_set("annotations", 1, bbox="here"), r"has bbox 'here'"),
        (_set("annotations", 1, area=-1), r"annotation 2 of .* has area -1; it must be .* from 0"),
        (_set("annotations", 1, area=2e10), r"has area 20000000000.0; it must be .* to 1e\+10"),
        (_set("annotations", 1, iscrowd=2), r"has iscrowd 2; it must be 0 or 1"),
        (
            _set("images", 0, width=0),
            r"image 1 of .* has width 0; it must be a whole number from 1",
        ),
        (_set("images", 0, width=60, height=80), r"a.png has 80x60 pixels, but its entry .* 60x80"),
        (_set("images", 1, file_name="c.jpg"), r"picture .*c.jpg is missing\.$"),
        (_set("images", 1, file_name="c" * 5000), r"cannot be read: File name too long\.$"),
        (_set("images", 1, file_name="a\nb"), r"has file_name 'a\\nb'; it must be a text of one"),
        (_set("images", 1, file_name="a\0b"), r"has file_name 'a\\x00b'; it must be a text of one"),
        (_set("images", 1, id=2**63), r"has id 9223372036854775808; it must be .* at most 63 bits"),
        (_set("annotations", 1, bbox=[1, 2, 3, 1e308]), r"none beyond 100000 pixels"),
    ],
)
def test_flawed_annotations_are_refused(folder: Path, change, sentence: str) -> None:
    content = read(folder)
    change(content)
    write(folder, content)
    with pytest.raises(DatasetError, match=sentence) as caught:
        load_split(folder, "train")
    assert "\n" not in str(caught.value)


def test_a_box_without_width_is_let_through(folder: Path) -> None:
    content = read(folder)
    content["annotations"][0]["bbox"] = [1, 1, 0, 5]
    write(folder, content)
    assert load_split(folder, "train").num_annotations == 3


def test_missing_folder_and_file(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere is not a folder"):
        load_split(folder / "nowhere", "train")
    with pytest.raises(
        DatasetError,
        match=r"neither annotations/val.json nor annotations/instances_val2017.json: "
        r"annotations holds train.json",
    ):
        load_split(folder, "val")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b'{"images": [1,\n 2 3]}',
            r"not valid JSON: Expecting ',' delimiter \(line 2, column 4\)",
        ),
        (b"[" + b"1" * 5000 + b"]", r"it has a number of thousands of digits"),
        (b"", r"not valid JSON: Expecting value \(line 1, column 1\)"),
        (b'{"images": "\xff"}', r"not UTF-8 text: invalid start byte at byte 12"),
        (b"[" * 100_000, r"nested too deeply"),
        (b"[1]", r"must hold a JSON object .*, got a list"),
    ],
)
def test_broken_json(folder: Path, content: bytes, sentence: str) -> None:
    (folder / "annotations" / "train.json").write_bytes(content)
    with pytest.raises(DatasetError, match=sentence):
        load_split(folder, "train")


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_truncated_pictures(folder: Path, name: str) -> None:
    picture = folder / "images" / name
    picture.write_bytes(picture.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=rf"picture .*{name} cannot be read: .*truncated"):
        load_split(folder, "train")


def test_pictures_that_are_none(folder: Path) -> None:
    for name in ("a.png", "b.jpg"):
        (folder / "images" / name).write_text("no picture")
    with pytest.raises(
        DatasetError, match=r"not a picture of a known format \(2 such pictures in train.json\)"
    ):
        load_split(folder, "train")
    (folder / "images" / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a.png cannot be read: it is empty"):
        load_split(folder, "train")


def test_bytes_after_the_end_and_turned_pictures_are_fine(folder: Path) -> None:
    for name in ("a.png", "b.jpg"):
        with open(folder / "images" / name, "ab") as stream:
            stream.write(b"\0" * 9000)
    load_split(folder, "train")

    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", (60, 80)).save(folder / "images" / "b.jpg", exif=exif)
    load_split(folder, "train")


@pytest.mark.parametrize(
    ("segmentation", "usable"),
    [
        ([[0, 0, 9, 0, 9, 9]], True),
        ([[0, 0, 9, 0]], False),
        ([[0, 0, 9, 0, 9, 9, 1]], False),
        ([[0, 0, 9, 0, 9, math.inf]], False),
        ([[0, 0, 9, 0, 9, None]], False),
        ([], False),
        (None, False),
        ({"size": [60, 80], "counts": [4000, 800]}, True),
        ({"size": [60, 80], "counts": [4000, 801]}, False),
        ({"size": [80, 60], "counts": [4000, 800]}, False),
        (coco_mask.encode(np.ones((60, 80), np.uint8, order="F")), True),
        ({"size": [60, 80]}, False),
    ],
)
def test_masks_are_recognised(folder: Path, segmentation, usable: bool) -> None:
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), bytes):
        segmentation = {**segmentation, "counts": segmentation["counts"].decode()}
    content = read(folder)
    content["annotations"][1]["segmentation"] = segmentation
    write(folder, content)
    split = load_split(folder, "train")
    assert split.has_masks is usable
    assert split.mask_problem.partition(" of ")[0] == ("" if usable else "annotation 2")


def test_what_pycocotools_and_mmdetection_do_without_is_completed(folder: Path) -> None:
    content = read(folder)
    whole = [dict(annotation) for annotation in content["annotations"]]
    for annotation in content["annotations"]:
        del annotation["area"]
    content["annotations"][2]["segmentation"] = []
    del content["annotations"][0]["iscrowd"]
    content["annotations"][1]["iscrowd"] = None
    content["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 30, 30]]  # half of its box
    write(folder, content)
    split = load_split(folder, "train")
    first, second, third = split.annotations.annotations
    half = int(coco_mask.area(coco_mask.frPyObjects(first["segmentation"], 60, 80))[0])
    assert first["area"] == half and 150 < half < 250
    assert (second["area"], third["area"]) == (400, 400)
    assert [one["iscrowd"] for one in (first, second, third)] == [0, 0, 1]
    assert split.notes == (
        f"2 of 3 annotations of {split.annotation_file} have no iscrowd: they are taken as "
        "objects (0).",
        f"3 of 3 annotations of {split.annotation_file} have no area: it is taken as that of the "
        "mask (2) or as width x height (1).",
    )
    # The same numbers as with the areas and signs in the file.
    whole[0]["area"] = half
    write(folder, {**content, "annotations": whole}, "val.json")
    found = perfect({"annotations": whole[:2]})
    measured = [
        evaluate(folder / "annotations" / name, found).stats for name in ("train.json", "val.json")
    ]
    assert str(measured[0]) == str(measured[1])


def test_ids_below_one_are_noted(folder: Path) -> None:
    content = read(folder)
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number
    write(folder, content)
    (note,) = load_split(folder, "train").notes
    assert "numbers its annotations from 0" in note and "stock CocoMetric and COCOEval" in note


def test_a_byte_order_mark_is_read(folder: Path) -> None:
    file = folder / "annotations" / "train.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    split = load_split(folder, "train")
    results = folder / "results.json"
    results.write_bytes(b"\xef\xbb\xbf" + json.dumps(perfect(read_back(split))).encode())
    assert evaluate(file, results).stats["mAP"] == pytest.approx(1.0)


def read_back(split) -> dict:
    return {"annotations": split.annotations.objects}


@pytest.mark.parametrize("mask", [[], None, "missing", [[1, 2]], {"size": [60, 80]}])
def test_a_crowd_region_needs_a_mask_as_objects_do(folder: Path, mask: object) -> None:
    # MMDetection's LoadAnnotations and COCOeval read it.
    content = read(folder)
    content["annotations"][2]["segmentation"] = mask
    if mask == "missing":
        del content["annotations"][2]["segmentation"]
    write(folder, content)
    split = load_split(folder, "train")
    sentence = "annotation 3 of .* \\(a crowd region\\) has no usable segmentation"
    assert not split.has_masks and re.match(sentence, split.mask_problem)
    with pytest.raises(DatasetError, match=sentence):
        evaluate(split.annotation_file, [], "segm")


def test_objects_of_no_use_are_counted(folder: Path) -> None:
    content = read(folder)
    more = [
        {"ignore": 1},
        {"ignore": True},
        {"bbox": [80, 10, 20, 20]},
        {"bbox": [10, -20, 20, 20]},
        {"bbox": [10, 10, 0, 20]},
        {"area": 0},
        {"bbox": [70, 50, 20, 20]},  # leaves the picture in part, and is used
    ]
    for number, change in enumerate(more):
        content["annotations"].append({**content["annotations"][0], "id": 10 + number, **change})
    write(folder, content)
    split = load_split(folder, "train")
    assert split.notes == (
        f"6 of 9 annotated objects of {split.annotation_file} are of no use to a training (2 with "
        "ignore 1, 2 outside of their picture, 2 without area or with a box of less than one "
        "pixel).",
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ignore": 1}, "2 with ignore 1"),
        ({"bbox": [90, 10, 20, 20]}, "2 outside of their picture"),
        ({"bbox": [10, 10, 0.5, 20]}, "2 without area or with a box of less than one pixel"),
    ],
)
def test_nothing_of_use_is_refused(folder: Path, change: dict, reason: str) -> None:
    content = read(folder)
    for annotation in content["annotations"]:
        annotation.update(change)
    write(folder, content)
    with pytest.raises(DatasetError, match=rf"all 2 annotated .* of no use \({reason}\): there is"):
        load_split(folder, "train")


def test_boxes_of_corners_are_refused(folder: Path) -> None:
    content = read(folder)
    corners = [[10, 10, 75, 40], [2, 3, 79, 59], [1, 1, 5, 1]]
    for annotation, box in zip(content["annotations"], corners, strict=True):
        annotation.update(bbox=box, iscrowd=0)
    write(folder, content)
    with pytest.raises(
        DatasetError,
        match=r"annotation 1 of .* has bbox \[10, 10, 75, 40\], which leaves its picture, and all "
        r"boxes look like x1, y1, x2, y2: they must be x, y, width, height \(2 such\)",
    ):
        load_split(folder, "train")
    content["annotations"][2]["bbox"] = [60, 40, 10, 30]  # no corners; it leaves the picture
    write(folder, content)
    load_split(folder, "train")


def rewrite(folder: Path, name: str, content: bytes = b"{}") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (
            "train/_annotations.coco.json",
            "it holds a Roboflow export in COCO's format (train/_annotations.coco.json), convert "
            "it: polyfocal convert ",
        ),
        ("train.json", "there is train.json, put it where it is looked for"),
    ],
)
def test_other_layouts_are_named(tmp_path: Path, file: str, sentence: str) -> None:
    rewrite(tmp_path, file)
    with pytest.raises(DatasetError) as caught:
        load_split(tmp_path, "train")
    assert str(caught.value).startswith(
        f"{tmp_path} has neither annotations/train.json nor annotations/instances_train2017.json: "
        f"{sentence}"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b'[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
            r"train.json is a file of detections \(COCO's results format\): the ground truth is an",
        ),
        (
            b'{"images": [], "categories": [], "annotations": [{"segments_info": []}]}',
            r"train.json is a panoptic file \(segments_info\): a detector needs objects with boxes",
        ),
    ],
)
def test_other_kinds_of_files_are_named(folder: Path, content: bytes, sentence: str) -> None:
    rewrite(folder, "annotations/train.json", content)
    with pytest.raises(DatasetError, match=sentence):
        load_split(folder, "train")


@pytest.mark.parametrize("place", ["images", "elsewhere"])
def test_backslashes_are_named(folder: Path, place: str) -> None:
    content = read(folder)
    content["images"][1]["file_name"] = "sub\\b.jpg"
    if place == "elsewhere":
        content["images"].reverse()
    write(folder, content)
    with pytest.raises(DatasetError, match="file_name .*has backslashes, write / in their place"):
        load_split(folder, "train")


def test_what_a_loader_says_of_a_picture_counts(folder: Path) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV, which comes with mmcv")
    picture = Image.new("RGB", (60, 80), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "images" / "a.png", exif=exif)
    load_split(folder, "train")  # OpenCV turns it to 80 x 60
    with pytest.raises(DatasetError, match="a.png has 60x80 pixels as it is loaded"):
        load_split(folder, "train", lambda path: np.asarray(Image.open(path)))
    dark = Image.fromarray(np.full((60, 80), 4095, np.uint16))
    dark.save(folder / "images" / "a.png")
    (note,) = load_split(folder, "train").notes
    assert note.startswith(f"picture {folder / 'images' / 'a.png'} is nearly black as it is loaded")


def test_a_file_is_opened_once_until_it_changes(folder: Path, monkeypatch) -> None:
    file = folder / "annotations" / "train.json"
    long_ago = file.stat().st_mtime_ns - 10**9
    os.utime(file, ns=(long_ago, long_ago))
    opened = []
    monkeypatch.setattr(annotations, "read_json", lambda file: opened.append(file) or read(folder))
    split = load_split(folder, "train")
    evaluate(file, [])
    evaluate(str(file.resolve()), [])
    assert opened == [file]
    found = split.annotations.coco()
    found.dataset["annotations"][0]["area"] = -5  # others are not disturbed
    assert split.annotations.annotations[0]["area"] == 400
    os.utime(file, ns=(long_ago + 1, long_ago + 1))
    evaluate(file, [])
    assert len(opened) == 2
    annotations.forget_annotations(file)
    evaluate(file, [])
    assert len(opened) == 3


# --- evaluate ---------------------------------------------------------------------------------


def perturbed(file: Path, seed: int = 0) -> list[dict]:
    """Detections made from the ground truth: moved, doubled, mislabelled, some left out."""
    content = json.loads(file.read_text())
    ids = [category["id"] for category in content["categories"]]
    rng = np.random.default_rng(seed)
    results = []
    for annotation in content["annotations"]:
        for _ in range(rng.integers(0, 4)):
            box = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
            rle = annotation["segmentation"]
            mask = np.roll(coco_mask.decode(rle), rng.integers(-1, 2, 2), (0, 1))
            moved = coco_mask.encode(np.asfortranarray(mask))
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": (
                        annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
                    ),
                    "score": float(rng.random()),
                    "bbox": [float(value) for value in np.maximum(box, 0)],
                    "segmentation": {**moved, "counts": moved["counts"].decode()},
                }
            )
    return results


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_equals_pycocotools_at_100_detections(digits: Path, iou_type: str) -> None:
    file = digits / "annotations" / "val.json"
    results = perturbed(file)
    given = copy.deepcopy(results)
    measured = evaluate(file, results, iou_type).stats
    assert results == given

    if iou_type == "segm":
        for result in given:
            del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        reference = COCOeval(truth, truth.loadRes(given), iou_type)
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert " ".join(measured) == PYCOCOTOOLS_ORDER
    for key, expected in zip(PYCOCOTOOLS_ORDER.split(), reference.stats, strict=True):
        if expected == -1:
            assert math.isnan(measured[key])
        else:
            assert measured[key] == pytest.approx(expected, abs=1e-12)
    assert 0.05 < measured["mAP"] < 0.95
    assert math.isnan(measured["mAP_l"])


def test_a_case_worked_by_hand(folder: Path) -> None:
    # Category 7 has one object, 3 has one object and a crowd. The detection of 7 is exact. That of
    # 3 has IoU 16 * 20 / 400 = 0.8: right at the thresholds 0.5, 0.55, ..., 0.8 (7 of 10), and a
    # second one, of higher score and wrong, halves its precision.
    results = [
        {"image_id": 1, "category_id": 7, "score": 0.9, "bbox": [10, 10, 20, 20]},
        {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [10, 10, 16, 20]},
        {"image_id": 1, "category_id": 3, "score": 0.8, "bbox": [50, 30, 20, 20]},
    ]
    result = evaluate(folder / "annotations" / "train.json", results)
    assert result.per_class == pytest.approx({"cat": 1.0, "dog": 0.35})
    assert result.stats["mAP"] == pytest.approx((1 + 0.35) / 2)
    assert result.stats["mAP_50"] == result.stats["mAP_75"] == pytest.approx(0.75)
    # One detection a picture and category: the wrong dog hides the right one.
    assert result.stats["AR@1"] == pytest.approx((1 + 0) / 2)
    assert result.stats["AR@100"] == pytest.approx((1 + 0.7) / 2)
    assert result.stats["mAP_s"] == pytest.approx((1 + 0.35) / 2)
    assert math.isnan(result.stats["AR_l"])

    arrays = [
        {
            "image_id": np.int64(result["image_id"]),
            "category_id": np.int64(result["category_id"]),
            "score": np.float32(result["score"]),
            "bbox": np.array(result["bbox"], np.float32),
        }
        for result in results
    ]
    assert str(evaluate(folder / "annotations" / "train.json", arrays)) == str(result)

    only = evaluate(folder / "annotations" / "train.json", results, category_ids=[3])
    assert only.per_class == pytest.approx({"dog": 0.35})
    assert only.stats["mAP"] == pytest.approx(0.35)


def test_more_than_100_objects_in_a_picture(tmp_path: Path) -> None:
    boxes = [[20 * (i % 15), 20 * (i // 15), 10, 10] for i in range(150)]
    truth = {
        "images": [{"id": 1, "file_name": "x.png", "width": 300, "height": 200}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0}
            for i, box in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    write(tmp_path, truth)
    results = [
        {"image_id": 1, "category_id": 1, "score": 1 - i / 1000, "bbox": box}
        for i, box in enumerate(boxes)
    ]
    file = tmp_path / "annotations" / "train.json"
    every = evaluate(file, results, max_dets=200).stats
    assert every["mAP"] == every["mAP_s"] == every["AR@200"] == every["AR_s"] == 1.0
    assert every["AR@10"] == pytest.approx(10 / 150)
    # 100 of 150 found: precision 1 up to recall 2/3, that is at 67 of the 101 recall points.
    some = evaluate(file, results, max_dets=100).stats
    assert some["AR@100"] == pytest.approx(100 / 150)
    assert some["mAP"] == pytest.approx(67 / 101)


def perfect(truth: dict) -> list[dict]:
    """A detection for each object, all of one score."""
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: one[key] for key in keys}, "score": 0.9} for one in truth["annotations"]]


@pytest.mark.parametrize("first", [0, -3, 1, -(2**63) + 1, 2**62])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ids_say_nothing(folder: Path, first: int, iou_type: str) -> None:
    # pycocotools takes an object's id for the sign that it was found, where 0 is "was not";
    # Detectron2's evaluator takes those below 0 for neither.
    content = read(folder)
    pictures = {image["id"]: first + number for number, image in enumerate(content["images"])}
    categories = {one["id"]: first + number for number, one in enumerate(content["categories"])}
    for number, annotation in enumerate(content["annotations"]):
        annotation.update(
            id=first + number,
            image_id=pictures[annotation["image_id"]],
            category_id=categories[annotation["category_id"]],
            iscrowd=0,
        )
    for one in content["images"]:
        one["id"] = pictures[one["id"]]
    for one in content["categories"]:
        one["id"] = categories[one["id"]]
    write(folder, content)
    found = perfect(content)
    for one, annotation in zip(found, content["annotations"], strict=True):
        one["segmentation"] = coco_mask.merge(
            coco_mask.frPyObjects(annotation["segmentation"], 60, 80)
        )
    file, both = folder / "annotations" / "train.json", {"cat": 1.0, "dog": 1.0}
    assert evaluate(file, found, iou_type).per_class == pytest.approx(both)
    calibration = DetectionCalibration()
    calibration.update(file, found, iou_type)
    result = calibration.compute()
    assert result.lrp == pytest.approx(0, abs=1e-12) and result.d_ece == pytest.approx(0.1)
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluate(COCO(str(file)), found, iou_type).per_class == pytest.approx(both)


def test_pycocotools_takes_the_id_0_for_not_found(folder: Path) -> None:
    content = read(folder)
    del content["annotations"][2]
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number
    write(folder, content)
    file = folder / "annotations" / "train.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        stock = COCOeval(truth, truth.loadRes(perfect(content)), "bbox")
        stock.evaluate()
        stock.accumulate()
        stock.summarize()
    assert stock.stats[0] == pytest.approx(0.5)
    assert evaluate(file, perfect(content)).stats["mAP"] == pytest.approx(1.0)


def test_an_evaluation_needs_no_names_of_pictures(folder: Path) -> None:
    content = read(folder)
    content["images"][0]["file_name"] = ""  # as MMDetection writes its samples' ground truth
    del content["images"][1]["file_name"]
    write(folder, content)
    file = folder / "annotations" / "train.json"
    assert evaluate(file, perfect(content)[:2]).stats["mAP"] == pytest.approx(1.0)
    with pytest.raises(DatasetError, match="image 1 of .* has file_name ''"):
        load_split(folder, "train")


def test_no_detection_gives_zeros(digits: Path) -> None:
    for iou_type in ("bbox", "segm"):
        result = evaluate(digits / "annotations" / "val.json", [], iou_type)
        assert set(result.per_class.values()) == {0.0}
        assert result.stats["mAP"] == result.stats["AR@1"] == result.stats["AR_s"] == 0.0
        assert math.isnan(result.stats["mAP_l"])


def test_takes_files_and_loaded_ground_truth(digits: Path, tmp_path: Path, capsys) -> None:
    file = digits / "annotations" / "val.json"
    results = perturbed(file)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    before = copy.deepcopy(truth.dataset)
    from_file = evaluate(str(file), tmp_path / "results.json", "segm")
    assert capsys.readouterr().out == ""
    assert str(evaluate(truth, results, "segm")) == str(from_file)
    assert truth.dataset == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_id": 9}, r"detection 0 of the results has image_id 9, not declared in .*train"),
        (
            {"image_id": [1]},
            r"has image_id \[1\]; it must be a whole number, one of those of .*train",
        ),
        ({"image_id": 1.0}, r"has image_id 1.0; it must be a whole number"),
        ({"image_id": True}, r"has image_id True; it must be a whole number"),
        ({"category_id": "7"}, r"has category_id '7'; it must be a whole number"),
        ({"category_id": 1}, r"has category_id 1, not declared in"),
        ({"score": math.nan}, r"has score nan; it must be a finite number"),
        ({"bbox": [1, 2, math.nan, 4]}, r"has bbox \[1, 2, nan, 4\]; it must be 4 numbers x, y"),
        ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]; it must be 4 numbers x, y"),
    ],
)
def test_results_that_do_not_fit(folder: Path, change: dict, sentence: str) -> None:
    file = folder / "annotations" / "train.json"
    result = {"image_id": 1, "category_id": 7, "score": 0.9, "bbox": [10, 10, 20, 20], **change}
    with pytest.raises(DatasetError, match=sentence):
        evaluate(file, [result])


def test_masks_are_counted_before_they_are_decoded() -> None:
    # What pycocotools itself encodes fits; runs that are more or fewer than the pixels do not.
    rng = np.random.default_rng(0)
    for height, width in ((7, 5), (1, 1), (300, 400)):
        for density in (0.0, 0.01, 0.5, 1.0):
            pixels = np.asfortranarray(rng.random((height, width)) < density, np.uint8)
            counts = coco_mask.encode(pixels)["counts"]
            for text in (counts, counts.decode()):
                rle = {"size": [height, width], "counts": text}
                assert is_compressed_rle(rle, [height, width])
                assert not is_compressed_rle(rle, [width, height + 1])
            other = {"size": [height, width + 1], "counts": counts}
            assert not is_compressed_rle(other, [height, width + 1]), "pixels are missing"
    for counts in ("", "P", "PPPP", "~", "\x00", "é", "7" * 99, None, 5, [35]):
        assert not is_compressed_rle({"size": [7, 5], "counts": counts}, [7, 5])
    for size in (None, 5, "75", [7], {}):
        assert not is_compressed_rle({"size": size, "counts": "S1"}, [7, 5])


@pytest.mark.parametrize("far", [1e9, math.nan, math.inf, 10**400, "1"])
def test_polygons_are_near_the_picture(folder: Path, far: object) -> None:
    content = read(folder)
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[0, 0, far, 0, 5, 5]]
    write(folder, content)
    split = load_split(folder, "train")
    assert not split.has_masks and "no usable segmentation" in split.mask_problem


def test_names_are_shown_as_they_are(folder: Path) -> None:
    content = read(folder)
    content["categories"][0]["name"] = "[/b] $\\x$"
    write(folder, content)
    result = evaluate(folder / "annotations" / "train.json", [])
    console = Console(file=io.StringIO(), width=200)
    console.print(format_table({"bbox": result}))
    assert "[/b] $\\x$" in console.file.getvalue()


def test_wrong_arguments_of_evaluate(folder: Path) -> None:
    file = folder / "annotations" / "train.json"
    result = {"image_id": 1, "category_id": 7, "score": 0.9, "bbox": [10, 10, 20, 20]}
    with pytest.raises(DatasetError, match=r"detection 0 of the results has no 'segmentation'"):
        evaluate(file, [result], "segm")
    rle = coco_mask.encode(np.ones((80, 60), np.uint8, order="F"))
    with pytest.raises(DatasetError, match=r"compressed RLE of size \[60, 80\]"):
        evaluate(file, [{**result, "segmentation": rle}], "segm")
    with pytest.raises(DatasetError, match=r"max_dets must be 10 or more, got 5"):
        evaluate(file, [], max_dets=5)
    with pytest.raises(DatasetError, match=r"iou_type must be 'bbox' or 'segm', got 'keypoints'"):
        evaluate(file, [], "keypoints")
    with pytest.raises(DatasetError, match=r"category id 4 is not declared"):
        evaluate(file, [], category_ids=[3, 4])
    with pytest.raises(DatasetError, match=r"the results must be a list of detections, got an obj"):
        evaluate(file, {})
    content = read(folder)
    del content["annotations"][0]["segmentation"]
    write(folder, content)
    with pytest.raises(DatasetError, match=r"annotation 1 of .* has no usable segmentation"):
        evaluate(file, [], "segm")


def test_the_table_shows_every_number(folder: Path) -> None:
    file = folder / "annotations" / "train.json"
    results = [{"image_id": 1, "category_id": 7, "score": 0.9, "bbox": [10, 10, 20, 20]}]
    console = Console(width=60, file=io.StringIO())
    console.print(
        format_table({"bbox": evaluate(file, results), "segm": evaluate(file, [], "segm")})
    )
    rows = {
        cells[0]: cells[1:]
        for line in console.file.getvalue().splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 3
    }
    assert rows["mAP"] == ["0.500", "0.000"]
    assert rows["cat"] == ["1.000", "0.000"]
    assert rows["mAP_l"] == ["-", "-"]
