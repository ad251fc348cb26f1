"""What the readers of other formats return, and what they share."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyfocal.data.files import DatasetError
from polyfocal.data.pictures import check_pictures, usual_loader
from polyfocal.errors import PackageError

PICTURES = frozenset((".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff"))
PICTURES |= {".webp"}
"""Endings of pictures, in lower case."""

_SPLITS = re.compile(r"(?:(train)|(val|valid|validation)|(test))(?:20\d\d)?", re.IGNORECASE)
_DECIMALS = 3  # of a pixel; supervision computes in float32


@dataclass
class Picture:
    """One picture and its objects.

    Attributes:
        path: The file.
        entry: COCO's entry: width and height as the picture is loaded, and what else is known.
        objects: COCO's annotations without ids, see :func:`coco_object`.
    """

    path: Path
    entry: dict[str, Any]
    objects: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Labelled:
    """A data set that was read.

    Attributes:
        categories: As COCO has them.
        splits: The pictures of ``train``, ``val`` and ``test``, those that there are.
        notes: What a person should know, a sentence each.
    """

    categories: list[dict[str, Any]]
    splits: dict[str, list[Picture]]
    notes: list[str]


def split_of(name: str) -> str | None:
    """The split that a folder or a key is named after: ``train``, ``val``, ``test`` or none."""
    found = _SPLITS.fullmatch(name)
    return None if found is None else ("train", "val", "test")[(found.lastindex or 1) - 1]


def coco_object(
    category_id: int,
    corners: Iterable[Any],
    polygons: Sequence[Iterable[float]] = (),
    crowd: bool = False,
) -> dict[str, Any]:
    """COCO's annotation of an object, without ids.

    Args:
        category_id: Its category.
        corners: x1, y1, x2, y2 in pixels, counted from the picture's corner.
        polygons: Its outlines, x1, y1, x2, y2, ... each; none if only the box is known.
        crowd: Whether it is neither to be learnt nor to be missed.
    """
    left, top, right, bottom = map(float, corners)
    box = [round(number, _DECIMALS) for number in (left, top, right - left, bottom - top)]
    found = {"category_id": category_id, "bbox": box, "iscrowd": int(crowd)}
    if polygons:
        found["segmentation"] = [[round(x, _DECIMALS) for x in polygon] for polygon in polygons]
    return found


def measured(paths: Sequence[Path], notes: list[str]) -> list[tuple[int, int]]:
    """Width and height of pictures as a training loads them: turned by their EXIF orientation.

    Args:
        paths: The files.
        notes: Gets a remark, if there is one.

    Raises:
        DatasetError: A picture is missing or cannot be loaded.
    """
    found = check_pictures(paths, [None] * len(paths), usual_loader())
    problems = [one.problem for one in found if one.problem]
    if problems:
        more = f" ({len(problems)} such pictures)" if len(problems) > 1 else ""
        raise DatasetError(f"{problems[0]}{more}.")
    notes += [f"{one.remark}." for one in found if one.remark][:1]
    return [one.size for one in found]


def agree(file: Path, said: tuple[int, int], picture: Path, size: tuple[int, int]) -> None:
    """Refuse labels that were made for a picture of another size.

    Raises:
        DatasetError: The sizes differ.
    """
    if said != size:
        turned = ", turned by its EXIF orientation" if said == size[::-1] else ""
        raise DatasetError(
            f"{file} is for a picture of {said[0]}x{said[1]} pixels, but {picture} is loaded with "
            f"{size[0]}x{size[1]}{turned}: its boxes would lie elsewhere."
        )


def note_outlines(splits: dict[str, list[Picture]], notes: list[str]) -> None:
    """Say so if some objects have an outline and others do not."""
    pictures = [picture for split in splits.values() for picture in split]
    objects = [one for picture in pictures for one in picture.objects]
    outlined = sum("segmentation" in one for one in objects)
    if 0 < outlined < len(objects):
        notes.append(
            f"{outlined} of {len(objects)} objects have an outline: the data serve for boxes only."
        )


def listed(values: Sequence[Any], most: int = 3) -> str:
    """The first of several values, for a message."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown}, ... {len(values)} in all" if len(values) > most else shown


def supervision_formats() -> tuple[Any, Any]:
    """The modules of supervision that read YOLO's lines and Pascal VOC's elements.

    Raises:
        PackageError: supervision is not installed.
    """
    try:
        from supervision.dataset.formats import pascal_voc, yolo
    except ImportError as error:
        raise PackageError(
            "YOLO's and Pascal VOC's labels are read with supervision, and "
            f"{error.name or 'a part of it'} is not installed: pip install 'polyfocal[convert]'"
        ) from error
    return yolo, pascal_voc
