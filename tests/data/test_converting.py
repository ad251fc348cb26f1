"""Conversion to COCO's layout: boxes worked out by hand, what is kept, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyfocal.coco import DatasetError, load_split
from polyfocal.commands.convert import main
from polyfocal.data import converting
from polyfocal.data.converting import convert
from polyfocal.errors import UserError

needs_library = pytest.mark.usefixtures("library")
SIZE = (80, 60)  # width and height of the pictures


@pytest.fixture(scope="module")
def library():
    reason = "needs the extra convert: pip install 'polyfocal[convert]'"
    pytest.importorskip("supervision", reason=reason)


def picture(file: Path, size=SIZE, orientation: int | None = None) -> Path:
    """A picture of stored size ``size``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    kind = {".png": "PNG", ".bmp": "BMP"}.get(file.suffix.lower(), "JPEG")
    Image.new("RGB", size, "white").save(file, kind, exif=exif)
    return file


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def yolo(root: Path, labels: dict[str, str | None], names="[cat, dog]", more="") -> Path:
    """Ultralytics' layout: labels by the picture's name below images/, None for no label file."""
    for name, text in labels.items():
        picture(root / "images" / name)
        if text is not None:
            write((root / "labels" / name).with_suffix(".txt"), text)
    splits = sorted({Path(name).parts[0] for name in labels})
    lines = [f"{split}: images/{split}" for split in splits]
    write(root / "data.yaml", "\n".join([*lines, f"names: {names}", more]))
    return root


def voc_xml(objects: str, name="a.jpg", size=SIZE) -> str:
    width, height = size
    return (
        f"<annotation><folder>x</folder><filename>{name}</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
    )


def voc_object(name: str, *corners: float, more="") -> str:
    tags = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{x}</{tag}>" for tag, x in zip(tags, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def voc(root: Path, objects: dict[str, str], lists: dict[str, str] | None = None) -> Path:
    """The VOC kit's layout: XML elements of the objects by the name of the picture's stem."""
    for stem, text in objects.items():
        picture(root / "JPEGImages" / f"{stem}.jpg")
        write(root / "Annotations" / f"{stem}.xml", voc_xml(text, f"{stem}.jpg"))
    for name, stems in (lists or {}).items():
        write(
            root / "ImageSets" / "Main" / f"{name}.txt",
            stems if "\n" in stems else stems.replace(" ", "\n"),
        )
    return root


def converted(root: Path, split: str = "train") -> tuple[dict, dict, list[str]]:
    """The content of a split, its objects by file name, and the lines that were printed."""
    out = root.with_name(f"{root.name}_coco")
    lines = convert(root, out)
    return *read(out, split), lines


def read(out: Path, split: str = "train") -> tuple[dict, dict]:
    content = json.loads((out / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {}
    for image in content["images"]:
        assert (out / "images" / split / image["file_name"]).is_file()
        found[image["file_name"]] = [
            (names[one["category_id"]], *one["bbox"])
            for one in content["annotations"]
            if one["image_id"] == image["id"]
        ]
    return content, found


def refused(root: Path) -> str:
    out = root.with_name(f"{root.name}_coco")
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert(root, out)
    assert sorted(out.parent.iterdir()) == before  # nothing is left behind
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "'"))
    return str(caught.value)


GOOD = "1 0.5 0.5 0.25 0.5\n"  # of 80 x 60 pixels: x 30 to 50, y 15 to 45
BOX = ("dog", 30, 15, 20, 30)


# --- YOLO -------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.5 0.5 0.25 0.5", ("cat", 30, 15, 20, 30)),
        ("1 0.5 0.5 1 1", ("dog", 0, 0, 80, 60)),
        ("1 0.125 0.25 0.05 0.1", ("dog", 8, 12, 4, 6)),
        ("1.0 .5 .5 2.5e-1 5E-1", BOX),  # as numpy.savetxt writes
        ("1 0.5 0.5 0.25 0.5 0.87", BOX),  # a confidence
        ("  1\t0.5  0.5 0.25 0.5  \r", BOX),
        ("1 0.505625 0.5 1.005 0.5", ("dog", 0.25, 15, 80.4, 30)),  # rounding takes it outside
    ],
)
def test_yolo_boxes(tmp_path: Path, line: str, box: tuple) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": f"{line}\n\n{line}", "val/b.jpg": GOOD})
    content, found, _ = converted(root)
    assert found == {"a.jpg": [pytest.approx(box, abs=1e-3)] * 2}
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert content["annotations"][0]["area"] == pytest.approx(box[3] * box[4], abs=0.05)
    assert [one["id"] for one in content["annotations"]] == [1, 2]


@needs_library
def test_yolo_polygons_become_masks(tmp_path: Path) -> None:
    """A right triangle with legs of 40 and 30 pixels; its area is 600."""
    triangle = "0 0.25 0.25 0.75 0.25 0.25 0.75"
    root = yolo(tmp_path / "set", {"train/a.jpg": triangle, "val/b.jpg": triangle + " 0.9"})
    content, _, _ = converted(root)
    (one,) = content["annotations"]
    assert one["segmentation"] == [[20, 15, 60, 15, 20, 45]]
    assert one["bbox"] == [20, 15, 40, 30]
    assert one["area"] == pytest.approx(600, abs=20)  # whole pixels
    assert load_split(tmp_path / "set_coco", "train").has_masks
    assert load_split(tmp_path / "set_coco", "val").has_masks  # the confidence is no coordinate
    _, _, lines = converted(yolo(tmp_path / "two", {"train/a.jpg": triangle, "val/b.jpg": GOOD}))
    assert "note: 1 of 2 objects have an outline: the data serve for boxes only." in lines


@needs_library
def test_keypoints_are_no_polygon(tmp_path: Path) -> None:
    line = "0 0.5 0.5 0.25 0.5 0.1 0.2 2 0.3 0.4 1"
    more = "kpt_shape: [2, 3]"
    root = yolo(tmp_path / "set", {"train/a.jpg": line, "val/b.jpg": GOOD}, more=more)
    content, found, lines = converted(root)
    assert found == {"a.jpg": [("cat", 30, 15, 20, 30)]}
    assert "segmentation" not in content["annotations"][0]
    assert "note: the keypoints of 1 objects are left out." in lines


@needs_library
def test_pictures_without_objects_are_kept(tmp_path: Path) -> None:
    labels = {"train/a.jpg": GOOD, "train/b.jpg": "", "train/c.jpg": None, "val/d.jpg": GOOD}
    _, found, lines = converted(yolo(tmp_path / "set", labels))
    assert found == {"a.jpg": [BOX], "b.jpg": [], "c.jpg": []}
    assert (
        f"note: 1 of 3 pictures of train have no label file, such as {tmp_path}/set/images/train/"
        "c.jpg: they are taken as pictures without objects."
    ) in lines


@needs_library
@pytest.mark.parametrize("names", ["[no, '1', 3.5, zèbre]", "{0: no, 1: 1, 2: 3.5, 3: zèbre}"])
def test_names_are_texts_in_their_order(tmp_path: Path, names: str) -> None:
    line = "3 0.5 0.5 0.25 0.5\n0 0.5 0.5 0.25 0.5"
    labels = {"train/a.jpg": line, "val/b.jpg": GOOD}
    content, found, lines = converted(yolo(tmp_path / "set", labels, names, "nc: 4"))
    assert [one["name"] for one in content["categories"]] == ["no", "1", "3.5", "zèbre"]
    assert [one[0] for one in found["a.jpg"]] == ["zèbre", "no"]
    assert "4 classes: no, 1, 3.5, zèbre" in lines


@needs_library
def test_numbers_of_classes_may_have_gaps(tmp_path: Path) -> None:
    names = "{10: ten, 2: two}"
    labels = {
        "train/a.jpg": "10 0.5 0.5 0.25 0.5\n2 0.5 0.5 0.25 0.5",
        "val/b.jpg": "2 .5 .5 .1 .1",
    }
    content, found, _ = converted(yolo(tmp_path / "set", labels, names))
    assert content["categories"] == [{"id": 3, "name": "two"}, {"id": 11, "name": "ten"}]
    assert [one[0] for one in found["a.jpg"]] == ["ten", "two"]


@needs_library
@pytest.mark.parametrize(
    ("places", "images", "labels"),
    [
        ("path: .\ntrain: images/train\nval: images/val", "images/{}", "labels/{}"),
        ("train: ../train/images\nval: ../valid/images\ntest:", "{}/images", "{}/labels"),
        ("train: {root}/train\nval: {root}/valid", "{}", "{}"),
        ("path: /content/set\ntrain: images/train\nval: images/val", "images/{}", "labels/{}"),
        (r"train: C:\data\set\images\train" "\nval: images\\val", "images/{}", "labels/{}"),
        ("train: /content/cells/train/images\nval: ./valid/images", "{}/images", "{}/labels"),
        ("train: [train/images]\nval:\n- valid/images\ntest: null", "{}/images", "{}/labels"),
        ("train: train.txt\nval: val.txt", "images/{}", "labels/{}"),
    ],
)
def test_places_of_ultralytics_and_roboflow(
    tmp_path: Path, places: str, images: str, labels: str
) -> None:
    root = tmp_path / "set"
    for split in ("train", "valid" if "valid" in places else "val"):
        file = picture(root / images.format(split) / "a.jpg")
        write(root / labels.format(split) / "a.txt", GOOD)
        write(root / f"{split}.txt", f"./{file.relative_to(root)}\n")
    write(root / "data.yaml", places.replace("{root}", str(root)) + "\nnc: 2\nnames: [cat, dog]\n")
    for given in (root, root / "data.yaml"):
        out = tmp_path / given.name.replace(".", "_")
        out = out.with_name(f"{out.name}_coco")
        convert(given, out)
        for split in ("train", "val"):
            assert read(out, split)[1] == {"a.jpg": [BOX]}


@needs_library
def test_of_several_descriptions_the_one_with_a_usual_name_is_read(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    other = (root / "data.yaml").read_text().replace("[cat, dog]", "[one, two]")
    write(root / "aug.yaml", other)
    write(root / "old" / "aug.yaml", other)
    _, found, lines = converted(root)
    assert found == {"a.jpg": [BOX]}
    assert lines[0] == f"read as a YOLO data set ({root / 'data.yaml'})"
    (root / "data.yaml").rename(root / "cells.yml")
    names = "has several descriptions (aug.yaml, cells.yml): give one of them, such as"
    shutil.rmtree(tmp_path / "set_coco")
    assert names in refused(root)
    convert(root / "cells.yml", tmp_path / "out")
    assert read(tmp_path / "out")[1] == {"a.jpg": [BOX]}


@needs_library
def test_a_description_below_the_folder(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set" / "inner", {"train/a.jpg": GOOD, "val/b.jpg": GOOD}).parent
    assert converted(root)[1] == {"a.jpg": [BOX]}
    shutil.rmtree(tmp_path / "set_coco")
    shutil.copytree(root / "inner", root / "second")
    assert "(inner/data.yaml, second/data.yaml): give one" in refused(root)


@needs_library
@pytest.mark.parametrize(
    ("images", "labels", "classes"),
    [
        ("images/{}/a.jpg", "labels/{}/a.txt", "classes.txt"),
        ("images/{}2017/a.jpg", "labels/{}2017/a.txt", "labels/classes.txt"),
        ("{}/images/a.jpg", "{}/labels/a.txt", "train/labels/classes.txt"),
        ("{}/a.jpg", "{}/a.txt", "train/_darknet.labels"),
    ],
)
def test_places_without_a_description(
    tmp_path: Path, images: str, labels: str, classes: str
) -> None:
    root = tmp_path / "set"
    for split in ("train", "val"):
        picture(root / images.format(split))
        write(root / labels.format(split), GOOD)
    write(root / classes, "cat\ndog\n")
    assert converted(root)[1] == {"a.jpg": [BOX]}
    assert read(tmp_path / "set_coco", "val")[1] == {"a.jpg": [BOX]}


@needs_library
def test_pictures_deep_in_folders_and_behind_links(tmp_path: Path) -> None:
    deep = "a/b/c/d/e/f.jpg"
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, f"train/{deep}": GOOD, "val/b.jpg": GOOD})
    (root / "images" / "train" / "a" / "back").symlink_to(root / "images" / "train")
    (root / "images" / "train" / "above").symlink_to(tmp_path)  # where more pictures are
    picture(tmp_path / "other" / "z.jpg")
    assert converted(root)[1] == {"a.jpg": [BOX], deep: [BOX]}

    root = tmp_path / "voc"
    one = voc_object("dog", 31, 16, 50, 45)
    for stem in ("train/a", "train/a/b/c/d/e/f", "valid/b"):
        picture(root / f"{stem}.jpg")
        write(root / f"{stem}.xml", voc_xml(one))
    (root / "train" / "a" / "back").symlink_to(root)
    assert converted(root)[1] == {"a.jpg": [BOX], deep: [BOX]}


@needs_library
def test_cvat_s_yolo_export(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in "abcde":
        picture(root / "obj_train_data" / f"{name}.PNG")
        write(root / "obj_train_data" / f"{name}.txt", GOOD)
    write(root / "train.txt", "".join(f"data/obj_train_data/{name}.PNG\n" for name in "abcde"))
    text = "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n"
    write(root / "obj.data", text)
    write(root / "obj.names", "cat\ndog\n")
    _, found, _ = converted(root)
    assert set(found) | set(read(tmp_path / "set_coco", "val")[1]) == {f"{n}.PNG" for n in "abcde"}


@needs_library
def test_without_a_val_split_a_fifth_is_held_out(tmp_path: Path) -> None:
    """LabelImg's folder: pictures, labels and classes.txt side by side."""
    root = tmp_path / "set"
    for number in range(10):
        picture(root / f"{number}.jpg")
        write(root / f"{number}.txt", GOOD)
    write(root / "classes.txt", "cat\ndog")
    write(root / "predefined.txt", "not a label")
    _, train, lines = converted(root)
    val = read(tmp_path / "set_coco", "val")[1]
    assert (len(train), len(val)) == (8, 2) and not train.keys() & val.keys()
    (note,) = (line for line in lines if line.startswith("note: "))
    assert note.startswith(
        "note: there is no val split: 2 of 10 pictures of train, chosen by their"
    )
    shutil.rmtree(tmp_path / "set_coco")
    assert converted(root)[1] == train  # the same choice again
    few = yolo(tmp_path / "few", {"train/a.jpg": GOOD})
    assert "has no val split, and 1 pictures are too few to hold a fifth" in refused(few)


@needs_library
def test_pictures_of_one_name_in_two_folders(tmp_path: Path) -> None:
    left = "0 0.25 0.5 0.5 1"
    labels = {"train/x/a.jpg": GOOD, "train/y/a.jpg": left, "val/b.jpg": GOOD, "val/x/a.jpg": left}
    _, found, _ = converted(yolo(tmp_path / "set", labels))
    assert found == {"x/a.jpg": [BOX], "y/a.jpg": [("cat", 0, 0, 40, 60)]}
    assert read(tmp_path / "set_coco", "val")[1] == {
        "b.jpg": [BOX],
        "x/a.jpg": [("cat", 0, 0, 40, 60)],
    }
    root = tmp_path / "lists"
    for place in ("one", "two"):
        picture(root / place / "images" / "a.jpg")
        write(root / place / "labels" / "a.txt", GOOD)
    text = "train: [one/images, two/images]\nval: one/images\nnames: [cat, dog]"
    write(root / "data.yaml", text)
    _, found, lines = converted(root)
    assert found == {"one/images/a.jpg": [BOX], "two/images/a.jpg": [BOX]}
    assert "note: 1 pictures are in train and in val: scores on val mean little." in lines


@needs_library
@pytest.mark.parametrize("ups", [1, 2, 3, 4])
def test_pictures_beside_the_folder_stay_inside_the_new_one(tmp_path: Path, ups: int) -> None:
    """A source ``../`` away from the others; a file of a user's lies where it would have gone."""
    root = yolo(tmp_path / "in/a/b/c/set", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    other = root.joinpath(*[".."] * ups, "more").resolve()
    picture(other / "images" / "e.jpg")
    write(other / "labels" / "e.txt", GOOD)
    up = "../" * ups
    text = f"train: [images/train, {up}more/images]\nval: images/val\nnames: [cat, dog]"
    write(root / "data.yaml", text)
    for place in (tmp_path, tmp_path / "out"):
        write(place / "more" / "images" / "mine.jpg", "mine")
        write(place / "more" / "images" / "e.jpg", "mine") if place != other.parent else None
    before = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    convert(root, tmp_path / "out" / "coco")
    _, found = read(tmp_path / "out" / "coco")
    here = root.relative_to(other.parent).as_posix()
    assert found == {f"{here}/images/train/a.jpg": [BOX], "more/images/e.jpg": [BOX]}
    assert (tmp_path / "out/more/images/e.jpg").read_text() == "mine"
    new = {file for file in tmp_path.rglob("*") if file.is_file()}.difference(before)
    assert all(file.is_relative_to(tmp_path / "out" / "coco") for file in new)


@pytest.mark.parametrize("name", ["../../../a.jpg", "a_jpg.rf.0123.jpg"])
def test_no_file_is_written_over(tmp_path: Path, monkeypatch, name: str) -> None:
    """Whatever the names of the pictures are: outside of the folder, or one for two of them."""
    monkeypatch.setattr(converting, "_file_names", lambda pictures: [name] * len(pictures))
    root = roboflow(tmp_path / "set")
    image = {"file_name": "b.jpg", "width": 80, "height": 60}
    content = json.loads((root / "train/_annotations.coco.json").read_text())
    content["images"].append({"id": 1, **image})
    write(root / "train/_annotations.coco.json", json.dumps(content))
    picture(root / "train" / "b.jpg")
    assert f" cannot become {name} of the train split, which is outside of it or there" in refused(
        root
    )


@needs_library
def test_one_picture_by_several_paths(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "train/b.jpg": GOOD})
    text = "train: images/train\nval: ../set/images/train\nnames: [cat, dog]"
    write(root / "data.yaml", text)
    note = "note: 2 pictures are in train and in val: scores on val mean little."
    assert note in converted(root)[2]
    shutil.rmtree(tmp_path / "set_coco")
    text = "train: [images/train, ../set/images/train]\nval: images/val\nnames: [cat, dog]"
    write(root / "data.yaml", text)
    (root / "images" / "val").mkdir()
    os.link(root / "images/train/a.jpg", root / "images/val/c.jpg")
    write(root / "labels" / "val" / "c.txt", GOOD)
    _, found, lines = converted(root)
    assert found == {"a.jpg": [BOX], "b.jpg": [BOX]}
    assert "note: 2 pictures of train are listed twice." in lines
    assert note.replace("2", "1") in lines


@needs_library
@pytest.mark.parametrize("name", ["größe 1.JPG", "猫.jpeg", "a.b.PNG", "Ω.Jpg"])
def test_names_and_endings_of_pictures(tmp_path: Path, name: str) -> None:
    root = yolo(tmp_path / "données 1", {f"train/{name}": GOOD, "val/b.jpg": GOOD})
    assert converted(root)[1] == {name: [BOX]}
    stem = Path(name).stem
    root = tmp_path / "voc"
    for split in ("train", "valid"):
        picture(root / split / name)
        write(root / split / f"{stem}.xml", voc_xml(voc_object("dog", 31, 16, 50, 45), name))
    assert converted(root)[1] == {name: [BOX]}


@needs_library
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_turned_pictures(tmp_path: Path, name: str) -> None:
    """Stored 60 x 80, and turned to 80 x 60 by the EXIF orientation, as every loader shows it."""
    root = yolo(tmp_path / "set", {f"train/{name}": GOOD, "val/b.jpg": GOOD})
    picture(root / "images" / "train" / name, (60, 80), orientation=6)
    content, found, _ = converted(root)
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (80, 60)
    assert found == {name: [BOX]}

    root = voc(tmp_path / "voc", {"a": voc_object("dog", 31, 16, 50, 45)})
    (root / "JPEGImages" / "a.jpg").unlink()
    picture(root / "JPEGImages" / name, (60, 80), orientation=6)
    for size, good in (((80, 60), True), ((0, 0), True), ((60, 80), False)):
        write(
            root / "Annotations" / "a.xml", voc_xml(voc_object("dog", 31, 16, 50, 45), name, size)
        )
        for split in ("train", "val"):
            write(root / "ImageSets" / "Main" / f"{split}.txt", "a")
        if good:
            assert converted(root)[1] == {name: [BOX]}
            shutil.rmtree(tmp_path / "voc_coco")
        else:
            assert refused(root) == (
                f"{root}/Annotations/a.xml is for a picture of 60x80 pixels, but {root}/JPEGImages/"
                f"{name} is loaded with 80x60, turned by its EXIF orientation: its boxes would lie "
                "elsewhere."
            )


@needs_library
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1 0.5 0.5 0.25", "expected at least 5 tokens"),
        ("1,0.5,0.5,0.25,0.5", "expected at least 5 tokens"),
        ("dog 0.5 0.5 0.25 0.5", "Invalid class id 'dog'"),
        ("1 0.5 0.5 nan 0.5", "expected a finite center"),
        ("1 0.5 0.5 -0.25 0.5", "expected a non-negative width"),
        ("1 0.5 x 0.25 0.5", "could not convert string to float: 'x'"),
        ("1 .1 .1 .2 .1 .2 .x", "could not convert string to float"),
        ("99999999999999999999 0.5 0.5 0.25 0.5", "too large"),
        ("2 0.5 0.5 0.25 0.5", "has class 2: {root}/data.yaml names the classes 0 to 1."),
        ("-1 0.5 0.5 0.25 0.5", "has class -1: {root}/data.yaml names the classes 0 to 1."),
        ("1 40 30 20 30", "holds 1, 40, 30, 20, 30: YOLO's numbers are parts of the picture's"),
        ("1 0.5 0.5 0.25 30", "YOLO's numbers are parts of the picture's width and height"),
        ("1 .1 .1 .2 .1 .2 inf", "must contain only finite numeric values"),
    ],
)
def test_a_broken_label_is_named_with_its_line(tmp_path: Path, line: str, sentence: str) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": f"\ufeff{GOOD}\n{line}\n", "val/b.jpg": GOOD})
    said = refused(root)
    assert said.startswith(f"{root}/labels/train/a.txt, line 3")
    assert sentence.replace("{root}", str(root)) in said


@needs_library
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: images/train\nnames: a", "names is a, which is not there."),
        ("train: images/train\nnames: [a, {b: c}]", "the name of class 1 must be a text"),
        ("train: images/train\nnames: {a: b}", "names must be a list of class names"),
        ("train: images/train\nnames: [a, a]", "two classes have the name 'a'"),
        ("train: images/train\nnc: 3\nnames: [a, b]", "says that there are 3 classes and names 2"),
        ("train: images/train\nval: images/nowhere\nnames: [a, b]", "val is images/nowhere, which"),
        ("train: a: b\nnames: [a, b]", "line 1 is not valid YAML: mapping values are not allowed"),
        ("nc: 2\nnames: [a, b]", "has neither train nor val"),
        ("train: {a: b}\nnames: [a, b]", "train must be a path or a list of paths"),
        ("train: data.yaml\nnames: [a, b]", "is neither a folder of pictures nor a list of them"),
        (
            "train: images/train\nnames: [a, b]\nkpt_shape: 17",
            "kpt_shape must be two whole numbers",
        ),
        ("val: images/val\nnames: [a, b]", "has no train split: val is there."),
    ],
)
def test_a_broken_description_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    write(root / "data.yaml", text)
    with pytest.raises(DatasetError) as caught:
        convert(root / "data.yaml", tmp_path / "out")
    assert sentence in str(caught.value) and str(root) in str(caught.value)


@needs_library
def test_a_test_split_that_is_not_there_or_has_no_labels(tmp_path: Path) -> None:
    labels = {"train/a.jpg": GOOD, "val/b.jpg": GOOD}
    root = yolo(tmp_path / "set", labels, more="test: ../test/images")
    lines = converted(root)[2]
    assert (
        f"note: {root}/data.yaml: test is ../test/images, which is not there: no test split is"
        in ("\n".join(lines))
    )
    root = yolo(tmp_path / "bare", {**labels, "test/c.jpg": None})
    lines = converted(root)[2]
    assert "note: the test split has no objects: it is left out." in lines
    assert sorted(os.listdir(tmp_path / "bare_coco" / "annotations")) == ["train.json", "val.json"]
    root = yolo(tmp_path / "all", {**labels, "test/c.jpg": GOOD})
    converted(root)
    assert read(tmp_path / "all_coco", "test")[1] == {"c.jpg": [BOX]}


@needs_library
def test_labels_and_pictures_that_miss_each_other(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "train/b.jpg": GOOD, "val/c.jpg": GOOD})
    (root / "images" / "train" / "b.jpg").unlink()
    assert refused(root) == (
        f"{root}/labels/train/b.txt has no picture: put the picture back, or remove the file."
    )
    root = yolo(tmp_path / "none", {"train/a.jpg": None, "val/b.jpg": GOOD})
    assert refused(root) == (
        f"none of the 1 pictures of {root}/images/train has labels: {root}/images/train/a.txt was "
        "looked for."
    )
    root = yolo(tmp_path / "cut", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    (root / "images" / "val" / "b.jpg").write_bytes(b"no picture")
    assert f"picture {root}/images/val/b.jpg cannot be read" in refused(root)
    root = yolo(tmp_path / "list", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    write(root / "train.txt", "images/train/a.jpg\n\nimages/train/gone.jpg\n")
    write(root / "data.yaml", "train: train.txt\nval: images/val\nnames: [cat, dog]")
    assert f"{root}/train.txt, line 3: images/train/gone.jpg is not there." == refused(root)


@needs_library
def test_names_that_are_nowhere(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    (root / "data.yaml").unlink()
    assert refused(root) == (
        f"{root} has YOLO's labels, but no names of the classes: write them to {root}/classes.txt, "
        "one per line in the order of their numbers."
    )
    write(root / "classes.txt", "cat\ndog")
    write(root / "labels" / "classes.txt", "dog\ncat")
    assert "has several lists of classes: " in refused(root)
    write(root / "labels" / "classes.txt", "cat\ndog\n")
    assert converted(root)[1] == {"a.jpg": [BOX]}


@needs_library
@pytest.mark.parametrize("names", ["classes.txt", "obj.names"])
def test_a_blank_line_among_the_names_would_number_them_anew(tmp_path: Path, names: str) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    (root / "data.yaml").unlink()
    if names == "obj.names":
        write(root / "obj.data", "train = images/train\nval = images/val\nnames = obj.names\n")
    write(root / names, "cat\n \ndog\n")
    assert refused(root) == (
        f"{root}/{names}, line 2 is blank, and the lines after it are numbered: remove it, or "
        "write what it stands for."
    )
    write(root / names, "cat\ndog\n\n \n")
    assert converted(root)[1] == {"a.jpg": [BOX]}


# --- Pascal VOC -------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("corners", "box"),
    [
        ((1, 1, 80, 60), ("dog", 0, 0, 80, 60)),  # all pixels of the picture
        ((31, 16, 50, 45), ("dog", 30, 15, 20, 30)),
        ((7, 9, 7, 9), ("dog", 6, 8, 1, 1)),  # one pixel
        ((50, 45, 31, 16), ("dog", 30, 15, 20, 30)),  # the corners the other way round
        ((31.5, 16.25, 50.0, 45), ("dog", 30.5, 15.25, 19.5, 29.75)),
    ],
)
def test_voc_counts_pixels_from_one(tmp_path: Path, corners: tuple, box: tuple) -> None:
    """Pixels xmin to xmax, counted from 1 and both in the box, are xmin - 1 to xmax on the axis."""
    objects = voc_object("dog", *corners) + voc_object("cat", 1, 1, 4, 4)
    root = voc(tmp_path / "set", {"a": objects, "b": objects}, {"train": "a", "val": "b"})
    content, found, _ = converted(root)
    assert found == {"a.jpg": [box, ("cat", 0, 0, 4, 4)]}
    assert [one["name"] for one in content["categories"]] == ["cat", "dog"]


@needs_library
def test_voc_that_counts_from_zero(tmp_path: Path) -> None:
    objects = {"a": voc_object("dog", 30, 15, 50, 45), "b": voc_object("dog", 0, 15, 50, 45)}
    root = voc(tmp_path / "set", objects, {"train": "a", "val": "b"})
    _, found, lines = converted(root)
    assert found == {"a.jpg": [BOX]}
    assert read(tmp_path / "set_coco", "val")[1] == {"b.jpg": [("dog", 0, 15, 50, 30)]}
    assert (
        f"note: object 1 of {root}/Annotations/b.xml begins at 0, where Pascal VOC counts pixels "
        "from 1: all boxes are taken as counted from 0."
    ) in lines


@needs_library
def test_difficult_objects_become_crowds(tmp_path: Path) -> None:
    objects = (
        voc_object("dog", 1, 1, 9, 9, more="<difficult>1</difficult>")
        + voc_object("dog", 31, 16, 50, 45, more="<difficult>0</difficult>")
        + voc_object("cat", 31, 16, 50, 45, more="<part><name>head</name></part>")
    )
    root = voc(tmp_path / "set", {"a": objects, "b": objects}, {"train": "a", "val": "b"})
    content, _, lines = converted(root)
    assert [one["iscrowd"] for one in content["annotations"]] == [1, 0, 0]
    assert [one["name"] for one in content["categories"]] == ["cat", "dog"]  # no head
    assert any(line.startswith("note: 2 of 6 objects are difficult: they") for line in lines)


@needs_library
def test_difficult_objects_are_ignored_as_mmdetection_ignores_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("mmdet.datasets", reason="needs MMDetection")
    objects = voc_object("dog", 1, 1, 9, 9, more="<difficult>1</difficult>")
    objects += voc_object("dog", 31, 16, 50, 45)
    root = voc(tmp_path / "VOC2007", {"a": objects, "b": objects}, {"train": "a", "val": "b"})
    common = dict(metainfo=dict(classes=("dog",)), pipeline=[])
    stock = datasets.VOCDataset(
        data_root=str(tmp_path),
        ann_file="VOC2007/ImageSets/Main/train.txt",
        data_prefix=dict(sub_data_root="VOC2007/"),
        **common,
    )
    converted(root)
    ours = datasets.CocoDataset(
        data_root=str(tmp_path / "VOC2007_coco"),
        ann_file="annotations/train.json",
        data_prefix=dict(img="images/train/"),
        **common,
    )
    theirs, mine = (one.get_data_info(0)["instances"] for one in (stock, ours))
    assert [one["ignore_flag"] for one in theirs] == [one["ignore_flag"] for one in mine] == [1, 0]
    for one, other in zip(theirs, mine, strict=True):
        # MMDetection takes 1 from the second corner too: its boxes end a pixel earlier.
        assert list(np.add(one["bbox"], [0, 0, 1, 1])) == other["bbox"]


@needs_library
def test_voc_polygons_become_masks(tmp_path: Path) -> None:
    corners = "".join(
        f"<{axis}{n}>{value}</{axis}{n}>"
        for n, point in enumerate([(21, 16), (61, 16), (21, 46)], start=1)
        for axis, value in zip("xy", point, strict=True)
    )
    one = voc_object("dog", 21, 16, 60, 45, more=f"<polygon>{corners}</polygon>")
    root = voc(tmp_path / "set", {"a": one, "b": one}, {"train": "a", "val": "b"})
    content, found, _ = converted(root)
    assert content["annotations"][0]["segmentation"] == [[20, 15, 60, 15, 20, 45]]
    assert found == {"a.jpg": [("dog", 20, 15, 40, 30)]}
    assert content["annotations"][0]["area"] == pytest.approx(600, abs=20)


@needs_library
@pytest.mark.parametrize(
    ("lists", "train", "val", "test"),
    [
        ({"train": "a b", "val": "c", "trainval": "a b c", "test": "d"}, "ab", "c", "d"),
        ({"trainval": "a b", "val": "c"}, "ab", "c", ""),
        ({"train": "a  1\nb -1", "val": "c.jpg", "test": "x y"}, "ab", "c", ""),
        ({"dog_train": "a  1\nb -1", "train": "a b", "val": "JPEGImages/c"}, "ab", "c", ""),
        ({"train": r"a" "\n" r"C:\set\b.JPG", "val": "c.xml"}, "ab", "c", ""),
    ],
)
def test_voc_s_lists_of_splits(
    tmp_path: Path, lists: dict, train: str, val: str, test: str
) -> None:
    objects = {name: voc_object("dog", 31, 16, 50, 45) for name in "abcd"}
    root = voc(tmp_path / "set", objects, lists)
    lines = converted(root)[2]
    for split, names in (("train", train), ("val", val), ("test", test)):
        if names:
            names = {f"{name}.jpg" for name in names}
            assert read(tmp_path / "set_coco", split)[1].keys() == names
    assert (tmp_path / "set_coco" / "annotations" / "test.json").exists() == bool(test)
    left = [line for line in lines if "in no list of splits" in line]
    assert bool(left) == (not test)


@needs_library
def test_names_with_spaces_in_voc_s_lists(tmp_path: Path) -> None:
    """With -1, 0 or 1 behind them, as class lists have; some names end in such a number."""
    names = ("my photo", "my photo 1", "my photo 2", "a.b", "a")
    objects = {name: voc_object("dog", 31, 16, 50, 45) for name in names}
    lists = {"train": "my photo 1\nmy photo  -1\n", "val": "my photo 2 1\na.b 0\n"}
    root = voc(tmp_path / "set", objects, lists)
    assert converted(root)[1].keys() == {"my photo.jpg", "my photo 1.jpg"}
    assert read(tmp_path / "set_coco", "val")[1].keys() == {"my photo 2.jpg", "a.b.jpg"}
    (root / "Annotations" / "a.b.xml").unlink()
    shutil.rmtree(tmp_path / "set_coco")
    assert "val.txt names a.b, of which " in refused(root)  # not a
    write(root / "ImageSets" / "Main" / "val.txt", "my photo 3\n")
    assert "val.txt names my photo 3, of which " in refused(root)


@needs_library
def test_voc_s_lists_for_folders_of_xml_files(tmp_path: Path) -> None:
    names = ("s/a", "s/b", "t/b", "t/c", "d", "t/d")
    objects = {name: voc_object("dog", 31, 16, 50, 45) for name in names}
    root = voc(tmp_path / "set", objects, {"train": "s/a t/b.jpg d", "val": "JPEGImages/s/b c"})
    _, found, lines = converted(root)
    assert found.keys() == {"s/a.jpg", "t/b.jpg", "d.jpg"}
    assert read(tmp_path / "set_coco", "val")[1].keys() == {"s/b.jpg", "t/c.jpg"}
    left = f"note: 1 XML files of {root}/Annotations are in no list of splits: left out."
    assert left in lines and not any("no val split" in line for line in lines)
    main = root / "ImageSets" / "Main"
    write(main / "val.txt", "b\n")
    shutil.rmtree(tmp_path / "set_coco")
    here = root / "Annotations"
    assert refused(root) == (
        f"{main}/val.txt names b, which may be {here}/s/b.xml or {here}/t/b.xml: write its folder "
        "before it."
    )
    (main / "train.txt").unlink()
    (main / "val.txt").rename(main / "default.txt")
    assert (
        f"note: {main} has none of train.txt, trainval.txt, val.txt, test.txt: its lists are not "
        "used."
    ) in converted(root)[2]


@needs_library
@pytest.mark.parametrize(
    ("image", "xml"),
    [
        ("{}/a.jpg", "{}/a.xml"),  # Roboflow's
        ("{}/images/a.png", "{}/annotations/a.xml"),
        ("images/{}/a.jpg", "annotations/{}/a.xml"),
        ("JPEGImages/{}/a.jpg", "Annotations/{}/a.xml"),
        ("pictures/{}/a.jpg", "{}/a.xml"),
    ],
)
def test_places_of_voc(tmp_path: Path, image: str, xml: str) -> None:
    root = tmp_path / "set"
    for split, name in (("train", "a"), ("valid", "a" if "pictures" not in image else "b")):
        picture(root / image.format(split).replace("a.", f"{name}."))
        write(
            root / xml.format(split).replace("a.", f"{name}."),
            voc_xml(voc_object("dog", 31, 16, 50, 45), "C:\\photos\\other.jpg"),
        )
    write(root / "labels.txt", "person\ndog\n")
    content, found, _ = converted(root)
    assert list(found.values()) == [[BOX]]
    assert [one["name"] for one in content["categories"]] == ["person", "dog"]
    assert list(read(tmp_path / "set_coco", "val")[1].values()) == [[BOX]]


@needs_library
def test_two_years_of_voc(tmp_path: Path) -> None:
    for year, name in (("VOC2007", "000001"), ("VOC2012", "2008_000001")):
        objects = {
            name: voc_object("dog", 31, 16, 50, 45),
            f"{name}v": voc_object("cat", 1, 1, 9, 9),
        }
        voc(tmp_path / "VOCdevkit" / year, objects, {"train": name, "val": f"{name}v"})
    _, found, _ = converted(tmp_path / "VOCdevkit")
    assert found == {
        "VOC2007/JPEGImages/000001.jpg": [BOX],
        "VOC2012/JPEGImages/2008_000001.jpg": [BOX],
    }


@needs_library
@pytest.mark.parametrize(
    ("xml", "sentence"),
    [
        ("<annotation><object>", "is not valid XML: "),
        ("<annotation>&x;</annotation>", "is not valid XML: "),
        (
            '<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>',
            "declares entities, which no label needs: refused.",
        ),
        ("<annotations/>", "is no file of Pascal VOC: its element is 'annotations'."),
        (voc_xml("", size=(64, 64)), "is for a picture of 64x64 pixels, but"),
        (voc_xml("", size=("wide", 60)), "has a size of wide x 60."),
        (voc_xml("<object><name>dog</name></object>"), ", object 1: Missing bndbox in Pascal VOC"),
        (
            voc_xml(voc_object("dog", 1, 1, 9, 9) + voc_object("dog", 1, 1, "x", 9)),
            ", object 2: Invalid 'xmax' value 'x'",
        ),
        (voc_xml(voc_object("", 1, 1, 9, 9)), ", object 1: Missing 'name'"),
        (voc_xml(voc_object(" ", 1, 1, 9, 9)), ", object 1 has no name."),
    ],
)
def test_a_broken_xml_file_is_named(tmp_path: Path, xml: str, sentence: str) -> None:
    objects = {"a": voc_object("dog", 31, 16, 50, 45), "b": voc_object("dog", 31, 16, 50, 45)}
    root = voc(tmp_path / "set", objects, {"train": "a", "val": "b"})
    write(root / "Annotations" / "b.xml", xml)
    assert refused(root).startswith(
        f"{root}/Annotations/b.xml{sentence if sentence[0] == ',' else ''}"
    )
    assert sentence in refused(root)


@needs_library
def test_voc_files_that_miss_each_other(tmp_path: Path) -> None:
    objects = {name: voc_object("dog", 31, 16, 50, 45) for name in "ab"}
    root = voc(tmp_path / "set", objects, {"train": "a", "val": "b c d"})
    assert refused(root) == (
        f"{root}/ImageSets/Main/val.txt names c, d, of which {root}/Annotations has no XML file."
    )
    write(root / "ImageSets" / "Main" / "val.txt", "b")
    (root / "JPEGImages" / "b.jpg").unlink()
    assert refused(root) == (
        f"{root}/Annotations/b.xml has no picture: neither b with the ending of a picture nor b.jpg"
        " is there."
    )
    picture(root / "JPEGImages" / "b.png")
    picture(root / "JPEGImages" / "b.bmp")
    assert "b.xml may be for " in refused(root)
    (root / "JPEGImages" / "b.bmp").unlink()
    shutil.rmtree(root / "ImageSets")
    for name in "efgh":
        picture(root / "JPEGImages" / f"{name}.jpg")
        write(root / "Annotations" / f"{name}.xml", voc_xml(voc_object("dog", 31, 16, 50, 45)))
    picture(root / "JPEGImages" / "z.jpg")
    write(root / "xml" / "h.xml", voc_xml(voc_object("dog", 31, 16, 50, 45)))
    assert refused(root) == (
        f"{root}/xml/h.xml has no picture: {root}/JPEGImages/h.jpg is the picture of "
        f"{root}/Annotations/h.xml."
    )
    shutil.rmtree(root / "xml")
    lines = converted(root)[2]
    assert (
        f"note: 1 pictures have no XML file, such as {root}/JPEGImages/z.jpg: they are left out."
    ) in lines


@needs_library
def test_an_xml_file_does_not_take_the_picture_of_another(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("train/a", "train/b", "valid/a"):
        picture(root / f"{name}.jpg")
        write(root / f"{name}.xml", voc_xml(voc_object("dog", 31, 16, 50, 45), ""))
    (root / "train" / "a.jpg").unlink()
    sentence = f"{root}/train/a.xml has no picture: {root}/valid/a.jpg is the picture of "
    assert refused(root) == f"{sentence}{root}/valid/a.xml."
    (root / "pictures").mkdir()
    (root / "valid" / "a.jpg").rename(root / "pictures" / "a.jpg")  # of which of the two?
    sentence = f"{root}/valid/a.xml has no picture: {root}/pictures/a.jpg is the picture of "
    assert refused(root) == f"{sentence}{root}/train/a.xml."
    picture(root / "valid" / "a.jpg")
    assert converted(root)[1] == {"pictures/a.jpg": [BOX], "train/b.jpg": [BOX]}


# --- Roboflow's COCO export -------------------------------------------------------------------


def roboflow(root: Path, splits=("train", "valid", "test"), **changes: object) -> Path:
    """An export as Roboflow writes it: ids from 0, and a category that is the group of the rest."""
    for split in splits:
        picture(root / split / "a_jpg.rf.0123.jpg")
        box = {"category_id": 2, "bbox": [30, 15, 20, 30], "area": 600, "iscrowd": 0}
        content = {
            "info": {"year": "2024"},
            "licenses": [],
            "categories": [
                {"id": 0, "name": "pets", "supercategory": "none"},
                {"id": 1, "name": "cat", "supercategory": "pets"},
                {"id": 2, "name": "dog", "supercategory": "pets"},
            ],
            "images": [
                {
                    "id": 0,
                    "license": 1,
                    "file_name": "a_jpg.rf.0123.jpg",
                    "width": 80,
                    "height": 60,
                    "extra": {"name": "a.jpg"},
                }
            ],
            "annotations": [{"id": 0, "image_id": 0, "segmentation": [], **box}],
        }
        content.update(changes)
        write(root / split / "_annotations.coco.json", json.dumps(content))
    return root


def test_a_roboflow_export(tmp_path: Path) -> None:
    content, found, lines = converted(roboflow(tmp_path / "set"))
    assert found == {"a_jpg.rf.0123.jpg": [BOX]}
    assert [one["name"] for one in content["categories"]] == ["cat", "dog"]
    assert [one["id"] for one in content["annotations"]] == [1]
    assert content["images"][0]["extra"] == {"name": "a.jpg"}
    for split in ("val", "test"):
        assert read(tmp_path / "set_coco", split)[1] == found
    assert [line for line in lines if line.startswith("note: ")] == [
        "note: the category 'pets' is the group of the others and has no objects: it is left out."
    ]


def test_a_roboflow_category_that_is_used_stays(tmp_path: Path) -> None:
    box = {"category_id": 0, "bbox": [30, 15, 20, 30], "area": 600, "iscrowd": 0}
    annotations = [{"id": 0, "image_id": 0, "segmentation": [], **box}]
    root = roboflow(tmp_path / "set", annotations=annotations)
    content, found, _ = converted(root)
    assert [one["name"] for one in content["categories"]] == ["pets", "cat", "dog"]
    assert found == {"a_jpg.rf.0123.jpg": [("pets", 30, 15, 20, 30)]}


def test_a_roboflow_class_with_the_name_of_its_group(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "dog", "supercategory": "none"},
        {"id": 2, "name": "dog", "supercategory": "dog"},
    ]
    content, found, lines = converted(roboflow(tmp_path / "set", categories=categories))
    assert [one["name"] for one in content["categories"]] == ["dog"]
    assert found == {"a_jpg.rf.0123.jpg": [BOX]}
    assert "note: the category 'dog' is the group of the others and has no" in "\n".join(lines)
    categories[0].update(id=1, supercategory="dog")
    box = {"image_id": 0, "bbox": [30, 15, 20, 30], "area": 600, "iscrowd": 0}
    both = [{"id": id_, "category_id": id_, **box} for id_ in (1, 2)]
    root = roboflow(tmp_path / "twice", categories=categories, annotations=both)
    assert "declares category name 'dog' 2 times" in refused(root)


def test_roboflow_exports_that_do_not_fit(tmp_path: Path) -> None:
    root = roboflow(tmp_path / "set")
    (root / "valid" / "a_jpg.rf.0123.jpg").unlink()
    assert f"picture {root}/valid/a_jpg.rf.0123.jpg is missing" in refused(root)
    picture(root / "valid" / "a_jpg.rf.0123.jpg", (60, 80))
    assert "is for a picture of 80x60 pixels, but " in refused(root)
    root = roboflow(tmp_path / "other", ("train",))
    roboflow(root, ("valid",), categories=[{"id": 2, "name": "bird", "supercategory": "none"}])
    assert "declare other categories." in refused(root)


def test_a_picture_that_occurs_twice(tmp_path: Path) -> None:
    image = {"file_name": "a_jpg.rf.0123.jpg", "width": 80, "height": 60}
    root = roboflow(tmp_path / "set", images=[{"id": 0, **image}, {"id": 1, **image}])
    said = refused(root)
    assert "a_jpg.rf.0123.jpg occurs 2 times in the t" in said and "keep one file of labels" in said
    root = roboflow(tmp_path / "bare", images=[], annotations=[])
    assert refused(root) == f"the train split of {root} has no pictures."


# --- All --------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_command(tmp_path: Path, capsys) -> None:
    root = roboflow(tmp_path / "a set")
    out = tmp_path / "new" / "out 1"
    assert run(root, out) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"read as a Roboflow export in COCO's format ({root}/test/_annotations.coco.json)",
        "2 classes: cat, dog",
        "train: 1 pictures, 1 objects",
        "val: 1 pictures, 1 objects",
        "test: 1 pictures, 1 objects",
        "note: the category 'pets' is the group of the others and has no objects: it is left out.",
        f"{out} is ready, with 3 pictures: polyfocal train retinanet_poly1 --data '{out}'",
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out 1"]
    assert run(root, out) == 2
    assert (
        capsys.readouterr().err == f"error: {out} is there already: give a new or empty folder.\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(root, empty) == 0


def test_pictures_are_linked_or_copied(tmp_path: Path, monkeypatch) -> None:
    root = roboflow(tmp_path / "set")
    original = root / "train" / "a_jpg.rf.0123.jpg"
    convert(root, tmp_path / "linked")
    assert (tmp_path / "linked" / "images" / "train" / original.name).samefile(original)

    def no_link(*arguments: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_link)
    convert(root, tmp_path / "copied")
    copy = tmp_path / "copied" / "images" / "train" / original.name
    assert copy.read_bytes() == original.read_bytes() and not copy.samefile(original)


@needs_library
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    root = yolo(tmp_path / "set", {"train/a.jpg": GOOD, "val/b.jpg": GOOD})
    try:
        (root / "images/train/a.jpg").rename(root / "images/train/caf\udce9.jpg")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    (root / "labels/train/a.txt").rename(root / "labels/train/caf\udce9.txt")
    assert "the name of the picture 'caf\\udce9.jpg' is not UTF-8" in refused(root)


def test_an_empty_folder_behind_a_link_is_filled(tmp_path: Path) -> None:
    root = roboflow(tmp_path / "set")
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    convert(root, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/annotations/train.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out", "set"]


def test_nothing_is_left_of_a_conversion_that_failed(tmp_path: Path, monkeypatch) -> None:
    root = roboflow(tmp_path / "set")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy2", full)
    assert run(root, tmp_path / "out") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "annotations.xml",
            "<annotations/>",
            "holds CVAT's XML ({root}/annotations.xml), which is",
        ),
        ("notes.md", "", "nothing in {root} is known: YOLO's labels, Pascal VOC's XML files and"),
    ],
)
def test_what_is_not_converted(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    root = tmp_path / "set"
    write(root / name, content)
    assert sentence.replace("{root}", str(root)) in refused(root)
    assert refused(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} is not there."


@pytest.mark.parametrize("missing", ["supervision", "defusedxml"])
@pytest.mark.parametrize("make", [yolo, voc])
def test_a_missing_library_gives_one_sentence(tmp_path: Path, missing: str, make) -> None:
    content = {"train/a.jpg": GOOD} if make is yolo else {"a": voc_object("dog", 1, 1, 9, 9)}
    root = make(tmp_path / "set", content)
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from polyfocal.commands.convert import main\n"
        f"sys.exit(main([{str(root)!r}, {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "pip install 'polyfocal[convert]'" in done.stderr and done.stderr.count("\n") == 1
