"""Writes data sets of other formats as folders in COCO's format."""

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from polyfocal.data.annotations import forget_annotations, read_annotations
from polyfocal.data.coco import load_split
from polyfocal.data.files import (
    DatasetError,
    folder_written_whole,
    identity,
    is_new,
    true_path,
    write_text,
)
from polyfocal.data.labelled import Labelled, Picture, agree, measured, split_of
from polyfocal.data.layouts import ROBOFLOW, Layout, files_below, recognise
from polyfocal.data.masks import area_of
from polyfocal.data.splits import held_out, remark_on_overlap
from polyfocal.data.voc import read_voc
from polyfocal.data.yolo import description_in, read_yolo
from polyfocal.errors import UserError

_READ = "YOLO's labels, Pascal VOC's XML files and Roboflow's exports"
_ORDER = ("train", "val", "test")
_FEWEST = 5  # pictures of which a fifth can be held out
_SHOWN = 10  # names of classes


def convert(source: str | Path, destination: str | Path) -> list[str]:
    """Write a data set as a folder in COCO's format, complete or not at all.

    The pictures are hard links to those of the source, or copies where links are impossible.

    Args:
        source: A folder with YOLO's labels, Pascal VOC's XML files or a Roboflow export; or the
            file that describes a YOLO data set.
        destination: The folder to make.

    Returns:
        What was written, and what a person should know about it, a line each.

    Raises:
        DatasetError: The source cannot be read as it is; the sentence names the file.
        PackageError: supervision is not installed.
        UserError: The destination is not empty.
    """
    source, destination = Path(source), Path(destination)
    if not is_new(destination):
        raise UserError(f"{destination} is there already: give a new or empty folder.")
    layout = _recognised(source)
    found = _READERS[layout.kind](source)
    for one in (one for pictures in found.splits.values() for one in pictures):
        one.path = true_path(one.path)
    _hold_out(source, found)
    _check_files(source, found)
    found.splits = {split: found.splits[split] for split in _ORDER if split in found.splits}
    train, val = ([identity(one.path) for one in found.splits[name]] for name in ("train", "val"))
    found.notes += remark_on_overlap(train, val)
    used = [one for pictures in found.splits.values() for one in pictures]
    lines = [
        f"read as {layout.what} ({layout.file})",
        _classes(found.categories),
        *(_count(split, pictures) for split, pictures in found.splits.items()),
    ]
    with folder_written_whole(destination) as folder:
        for split, pictures in found.splits.items():
            _write(folder, split, pictures, found.categories)
        found.notes += _checked(source, folder, found.splits)
    command = f"polyfocal train retinanet_poly1 --data {shlex.quote(str(destination))}"
    ready = f"{destination} is ready, with {len(used)} pictures: {command}"
    return [*lines, *(f"note: {note}" for note in dict.fromkeys(found.notes)), ready]


def _recognised(source: Path) -> Layout:
    if not source.exists():
        raise DatasetError(f"{source} is not there.")
    layout = recognise(source)
    if layout is None:
        raise DatasetError(f"nothing in {source} is known: {_READ} are converted.")
    if not layout.kind:
        raise DatasetError(
            f"{source} holds {layout.what} ({layout.file}), which is not converted: "
            f"{layout.advice}. {_READ} are converted."
        )
    if source.is_file() and layout.kind != "yolo":
        raise DatasetError(f"{source} is one file of a data set: give its folder.")
    described = description_in(source) if layout.kind == "yolo" and source.is_dir() else None
    return replace(layout, file=described) if described else layout


def read_roboflow(source: Path) -> Labelled:
    """Read a Roboflow export in COCO's format: a file of annotations in the folder of each split.

    Raises:
        DatasetError: A file or a picture cannot be used.
    """
    files = [file for file in files_below(source) if file.name == ROBOFLOW]
    found = {file: read_annotations(file, unique_names=False) for file in files}
    notes: list[str] = []
    used = {one["category_id"] for each in found.values() for one in each.annotations}
    kept: dict[Path, list[dict[str, Any]]] = {}
    for file, each in found.items():
        above = {category.get("supercategory") for category in each.categories}
        kept[file] = [
            category
            for category in each.categories
            if category["id"] in used or category["name"] not in above
        ]
        notes += [
            f"the category {category['name']!r} is the group of the others and has no objects: it "
            "is left out."
            for category in each.categories
            if category not in kept[file]
        ]
    names = {file: [(one["id"], one["name"]) for one in kept[file]] for file in files}
    for file in files:
        if names[file] != names[files[0]]:
            raise DatasetError(f"{files[0]} and {file} declare other categories.")
    splits: dict[str, list[Picture]] = {}
    for file, each in found.items():
        split = split_of(file.parent.name) or "train"
        if split in splits:
            raise DatasetError(f"{source} has several files for the {split} split, such as {file}.")
        paths = [file.parent / image["file_name"] for image in each.images]
        pictures = {}
        for path, size, image in zip(paths, measured(paths, notes), each.images, strict=True):
            agree(file, (image["width"], image["height"]), path, size)
            pictures[image["id"]] = Picture(path, image)
        for one in each.annotations:
            pictures[one["image_id"]].objects.append(one)
        splits[split] = list(pictures.values())
    return Labelled(kept[files[0]], splits, notes)


_READERS: dict[str, Callable[[Path], Labelled]] = {
    "yolo": read_yolo,
    "voc": read_voc,
    "roboflow": read_roboflow,
}


def _hold_out(source: Path, found: Labelled) -> None:
    """Take the val split from the train split if there is none; leave a test split without objects.

    Every fifth picture is taken by its name, see :func:`polyfocal.data.splits.held_out`.
    """
    splits = found.splits
    if "test" in splits and not any(one.objects for one in splits["test"]):
        found.notes.append("the test split has no objects: it is left out.")
        del splits["test"]
    if "train" not in splits:
        there = ", ".join(splits) or "nothing"
        raise DatasetError(f"{source} has no train split: {there} is there.")
    if "val" in splits:
        return
    whole = splits["train"]
    if len(whole) < _FEWEST:
        raise DatasetError(
            f"{source} has no val split, and {len(whole)} pictures are too few to hold a fifth of "
            "them out for it."
        )
    names = _file_names(whole)
    out = dict(zip(names, held_out(names), strict=True))
    pairs = list(zip(whole, names, strict=True))
    splits["train"] = [one for one, name in pairs if not out[name]]
    splits["val"] = [one for one, name in pairs if out[name]]
    found.notes.append(
        f"there is no val split: {len(splits['val'])} of {len(whole)} pictures of train, chosen by "
        "their names, are held out for it. If pictures belong together, as frames of a video do, "
        "divide them yourself."
    )


def _check_files(source: Path, found: Labelled) -> None:
    for split, pictures in found.splits.items():
        if not pictures:
            raise DatasetError(f"the {split} split of {source} has no pictures.")
        path, count = Counter(one.path for one in pictures).most_common(1)[0]
        if count > 1:
            raise DatasetError(
                f"{path} occurs {count} times in the {split} split: keep one file of labels, or "
                "one entry, for it."
            )
        for name in _file_names(pictures):
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DatasetError(
                    f"the name of the picture {name!a} is not UTF-8, as JSON's texts are: rename "
                    "it, and the file of its labels."
                ) from None


def _file_names(pictures: list[Picture]) -> list[str]:
    """The paths of pictures below the deepest folder that has all of them: each is unique."""
    folder = os.path.commonpath([one.path.parent for one in pictures])
    return [one.path.relative_to(folder).as_posix() for one in pictures]


def _write(
    folder: Path, split: str, pictures: list[Picture], categories: list[dict[str, Any]]
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, picture) in enumerate(
        zip(_file_names(pictures), pictures, strict=True), start=1
    ):
        image = {**picture.entry, "id": number, "file_name": name}
        images.append(image)
        for one in picture.objects:
            annotation = {**one, "id": len(annotations) + 1, "image_id": number}
            if "area" not in one:
                annotation["area"], _ = area_of(one, [image["height"], image["width"]])
            annotations.append(annotation)
        target = folder / "images" / split / name
        if ".." in Path(name).parts or os.path.lexists(target):  # never write over another file
            raise DatasetError(
                f"{picture.path} cannot become {name} of the {split} split, which is outside of it "
                "or there already: give the picture another name."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(picture.path.resolve(), target)
        except OSError:
            shutil.copy2(picture.path, target)
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_text(folder / "annotations" / f"{split}.json", json.dumps(content, ensure_ascii=False))


def _checked(source: Path, folder: Path, splits: dict[str, list[Picture]]) -> list[str]:
    """Remarks on what was written, by the check that a training makes."""
    notes: list[str] = []
    for split in splits:
        try:
            notes += load_split(folder, split).notes
        except DatasetError as error:
            sentence = str(error).replace(f"{folder}{os.sep}", "")
            raise DatasetError(f"{source} cannot be trained on: {sentence}") from None
        finally:
            forget_annotations(folder / "annotations" / f"{split}.json")
    return [note.replace(f"{folder}{os.sep}", "") for note in notes]


def _classes(categories: list[dict[str, Any]]) -> str:
    names = [category["name"] for category in categories]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} classes: {shown}" if len(names) != 1 else f"1 class: {shown}"


def _count(split: str, pictures: list[Picture]) -> str:
    objects = sum(len(one.objects) for one in pictures)
    return f"{split}: {len(pictures)} pictures, {objects} objects"
