"""COCO annotation files: read once, checked, completed, and asked by everything else."""

import contextlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from polyfocal.data.files import DatasetError, Kept, read_json
from polyfocal.data.layouts import foreign_json
from polyfocal.data.masks import FARTHEST, area_of, is_number, is_segmentation

_MOST_BITS = 63  # of an id: NumPy and pycocotools keep them as int64
_LONGEST_SIDE = 65_535  # pixels, of a JPEG; pycocotools counts the pixels of a mask in 32 bits
_KINDS = ("images", "annotations", "categories")
_SOFT = ("category_ids", "category_scores")
_FILES_KEPT = 2  # train and val


@dataclass(frozen=True, eq=False)
class Annotations:
    """The content of an annotation file. It is shared by all its readers, so nobody may change it.

    Attributes:
        source: How messages call the file.
        content: All of the file. Every annotation has an ``iscrowd`` and an ``area``.
        notes: What was added or is unusual, a sentence each.
    """

    source: str
    content: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def images(self) -> list[dict[str, Any]]:
        """The pictures, in the order of the file."""
        return self.content["images"]

    @property
    def annotations(self) -> list[dict[str, Any]]:
        """Objects and crowd regions, in the order of the file."""
        return self.content["annotations"]

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The categories, in the order of the file, which is that of the labels."""
        return self.content["categories"]

    @cached_property
    def objects(self) -> list[dict[str, Any]]:
        """The annotations that are not crowd regions."""
        return [one for one in self.annotations if not one["iscrowd"]]

    @cached_property
    def max_instances(self) -> int:
        """Most objects in one picture."""
        return max(Counter(one["image_id"] for one in self.objects).values(), default=0)

    @cached_property
    def class_by_class(self) -> "Annotations":
        """An object of several classes once per class, as an evaluation counts it.

        It counts for the classes whose score is 0.5 or more, or else for its ``category_id``, which
        then is all that is said of its class.
        """
        if not any(map(is_soft, self.annotations)):
            return self
        taken = {one["id"] for one in self.annotations}
        free = (number for number in itertools.count(1) if number not in taken)
        categories = [category["id"] for category in self.categories]
        counted = []
        for one in self.annotations:
            scores = zip(categories, class_scores(one, categories), strict=True)
            found = [category for category, score in scores if score >= 0.5]
            first = one["category_id"] if one["category_id"] in found or not found else found[0]
            hard = {key: value for key, value in one.items() if key not in _SOFT}
            counted.append({**hard, "category_id": first})
            others = [category for category in found if category != first]
            counted += [{**hard, "category_id": each, "id": next(free)} for each in others]
        return replace(self, content={**self.content, "annotations": counted})

    def of_classes(self, names: Collection[str]) -> "Annotations":
        """With the categories of these names alone."""
        kept = [category for category in self.categories if category["name"] in names]
        if len(kept) == len(self.categories):
            return self
        ids = {category["id"] for category in kept}
        counted = [one for one in self.class_by_class.annotations if one["category_id"] in ids]
        content = {**self.content, "categories": kept, "annotations": counted}
        return replace(self, content=content)

    @cached_property
    def sizes(self) -> dict[int, list[int]]:
        """Height and width of each picture by its id, in the order of an RLE's size."""
        return {image["id"]: [image["height"], image["width"]] for image in self.images}

    @cached_property
    def mask_problem(self) -> str:
        """Why the file does not serve for masks, a sentence; empty if it does.

        Crowd regions need a mask too: the frameworks and COCO's evaluation read it.
        """
        bad = [
            one
            for one in self.annotations
            if not is_segmentation(one.get("segmentation"), self.sizes[one["image_id"]])
        ]
        if not bad:
            return ""
        crowd = " (a crowd region)" if bad[0]["iscrowd"] else ""
        return (
            f"annotation {bad[0]['id']} of {self.source}{crowd} has no usable segmentation; a mask "
            "is a list of polygons of 3 points or more, or an RLE of the picture's "
            f"size{more(bad)}."
        )

    def coco(self, kind: type[Any] = COCO) -> Any:
        """The file as pycocotools loads it, with copies of the entries, since it writes into them.

        The annotations are numbered from 1: for pycocotools, and code built on it, the id of an
        object means that the object was found, and 0 that it was not.

        Args:
            kind: pycocotools' class or a subclass.
        """
        loaded = kind()
        loaded.dataset = {
            **self.content,
            "images": [dict(image) for image in self.images],
            "annotations": [
                {**one, "id": number} for number, one in enumerate(self.annotations, start=1)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            loaded.createIndex()
        return loaded


_kept = Kept[Annotations](_FILES_KEPT)


def read_annotations(
    file: str | Path, *, pictures: bool = True, unique_names: bool = True
) -> Annotations:
    """Read an annotation file, or return what was read if the file has not changed since.

    A missing ``iscrowd`` is taken as 0. A missing area is that of the mask if there is one,
    otherwise width x height.

    Args:
        file: The JSON file.
        pictures: Whether the names of the picture files are needed. MMDetection leaves them empty
            when it writes the ground truth of its own samples.
        unique_names: Whether each category needs a name of its own.

    Raises:
        DatasetError: The file cannot be read, or contradicts itself.
    """
    file = Path(file)
    found = _kept.get(os.path.realpath(file), [file], lambda: _checked(read_json(file), str(file)))
    if unique_names:
        _check_unique(found.source, "category", found.categories, "name")
    if pictures:
        _check_fields(found.source, "image", found.images, {"file_name": _NAME})
    return found


def forget_annotations(file: str | Path) -> None:
    """Free the memory of a file that was read."""
    _kept.forget(os.path.realpath(file))


def annotations_of(ground_truth: "str | Path | COCO | Annotations") -> Annotations:
    """The annotations of an evaluation, in any of three forms.

    Args:
        ground_truth: A file, an object of pycocotools (left unchanged), or annotations.

    Raises:
        DatasetError: They cannot be used.
    """
    if isinstance(ground_truth, Annotations):
        return ground_truth
    if isinstance(ground_truth, COCO):
        content = dict(ground_truth.dataset)
        if isinstance(content.get("annotations"), list):
            content["annotations"] = [
                dict(one) if isinstance(one, dict) else one for one in content["annotations"]
            ]
        found = _checked(content, "the ground truth")
        _check_unique(found.source, "category", found.categories, "name")
        return found
    return read_annotations(ground_truth, pictures=False)


def _checked(content: Any, source: str) -> Annotations:
    foreign = foreign_json(content)
    if foreign is not None:
        what, advice = foreign
        raise DatasetError(f"{source} is {what}: {advice}.")
    if not isinstance(content, dict):
        raise DatasetError(
            f"{source} must hold a JSON object with images, annotations and categories, "
            f"got {kind_of(content)}."
        )
    if "annotations" not in content and isinstance(content.get("images"), list):
        # MMDetection writes no annotations if no sample has an object.
        content = {**content, "annotations": []}
    for key in _KINDS:
        if key not in content:
            raise DatasetError(f"{source} has no {key!r}; a COCO file needs a list of them.")
        if not isinstance(content[key], list):
            raise DatasetError(f"{key!r} of {source} must be a list, got {kind_of(content[key])}.")
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise DatasetError(
                    f"entry {index} of {key!r} in {source} must be an object, got {kind_of(entry)}."
                )
    images, annotations, categories = (content[key] for key in _KINDS)
    _check_fields(source, "category", categories, {"id": _ID, "name": _NAME})
    _check_unique(source, "category", categories, "id")
    if not categories:
        raise DatasetError(f"{source} declares no categories; it needs at least one.")
    _check_fields(source, "image", images, {"id": _ID, "width": _SIDE, "height": _SIDE})
    _check_unique(source, "image", images, "id")
    _check_fields(
        source,
        "annotation",
        annotations,
        {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX},
    )
    _check_unique(source, "annotation", annotations, "id")
    for key, declared, kind in (
        ("image_id", {image["id"] for image in images}, "pictures"),
        ("category_id", {category["id"] for category in categories}, "categories"),
    ):
        bad = [annotation for annotation in annotations if annotation[key] not in declared]
        if bad:
            raise DatasetError(
                f"annotation {bad[0]['id']} of {source} has {key} {bad[0][key]}, which is not "
                f"among the declared {kind} ({_listed(declared)}){more(bad)}."
            )
    _check_classes(source, annotations, [category["id"] for category in categories])
    notes = _complete(source, annotations, images)
    _check_fields(source, "annotation", annotations, {"area": _AREA, "iscrowd": _CROWD})
    soft = sum(map(is_soft, annotations))
    if soft:
        notes.append(
            f"{soft} of {len(annotations)} annotations of {source} say more of their classes "
            "(category_ids, category_scores): an evaluation counts it, a training does with "
            "SoftLabelsHook only, as in retinanet_soft_labels."
        )
    lowest = min((one["id"] for one in annotations), default=1)
    if lowest < 1:
        notes.append(
            f"{source} numbers its annotations from {lowest}: polyfocal evaluates them rightly, but"
            " stock CocoMetric and COCOEvaluator need ids from 1: there 0 means never found."
        )
    return Annotations(source, content, tuple(notes))


def is_soft(annotation: dict[str, Any]) -> bool:
    """Whether an annotation says more about its classes than the ``category_id``."""
    return any(key in annotation for key in _SOFT)


def class_scores(annotation: dict[str, Any], categories: Sequence[int]) -> list[float]:
    """The score of each category for an object, in [0, 1].

    ``category_ids`` are the categories of the object, ``category_scores`` their scores. Without
    either, ``category_id`` has the score 1.

    Args:
        annotation: One that :func:`read_annotations` has read. It has put ids beside scores without
            ids, which are for all categories in the order of the file.
        categories: Ids of the categories whose scores are asked for.
    """
    ids = annotation.get("category_ids", [annotation["category_id"]])
    found = dict(zip(ids, annotation.get("category_scores", [1.0] * len(ids)), strict=True))
    return [float(found.get(category, 0.0)) for category in categories]


def _check_classes(
    source: str, annotations: list[dict[str, Any]], categories: Sequence[int]
) -> None:
    declared = set(categories)

    def are_ids(value: Any) -> bool:
        return (
            isinstance(value, list)
            and bool(value)
            and all(is_whole(one) and one in declared for one in value)
            and len(set(value)) == len(value)
        )

    soft = [one for one in annotations if is_soft(one)]
    several = "a list of declared categories, each once"
    _check_fields(
        source,
        "annotation",
        [one for one in soft if "category_ids" in one],
        {"category_ids": (are_ids, several)},
    )
    for one in soft:
        if "category_scores" not in one:
            continue
        count = len(one.get("category_ids", categories))
        which = "of its category_ids" if "category_ids" in one else "of the declared categories"
        said = f"a list of {count} numbers from 0 to 1, one for each {which}"
        rule: _Rule = (partial(_are_shares, count), said)
        _check_fields(source, "annotation", [one], {"category_scores": rule})
        one.setdefault("category_ids", categories)


def _are_shares(count: int, value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(is_number(number) and 0 <= number <= 1 for number in value)
    )


def _complete(
    source: str, annotations: list[dict[str, Any]], images: list[dict[str, Any]]
) -> list[str]:
    notes = []
    bare = [one for one in annotations if one.get("iscrowd") is None]
    for one in bare:
        one["iscrowd"] = 0
    if bare:
        notes.append(
            f"{len(bare)} of {len(annotations)} annotations of {source} have no iscrowd: they are "
            "taken as objects (0)."
        )
    bare = [one for one in annotations if one.get("area") is None]
    sizes = {image["id"]: [image["height"], image["width"]] for image in images} if bare else {}
    masks = 0
    for one in bare:
        one["area"], of_mask = area_of(one, sizes[one["image_id"]])
        masks += of_mask
    if bare:
        notes.append(
            f"{len(bare)} of {len(annotations)} annotations of {source} have no area: it is taken "
            f"as that of the mask ({masks}) or as width x height ({len(bare) - masks})."
        )
    return notes


def is_finite_box(value: Any) -> bool:
    """Whether the value is 4 numbers of pixels."""
    return (
        isinstance(value, (list, tuple, np.ndarray))
        and len(value) == 4
        and all(is_number(number) and abs(number) <= FARTHEST for number in value)
    )


def _is_box(value: Any) -> bool:
    return is_finite_box(value) and value[2] >= 0 and value[3] >= 0


def is_whole(value: Any) -> bool:
    """Whether the value is a whole number, and not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


# Control characters, other line endings, and halves of characters: no file name holds them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_Rule = tuple[Callable[[Any], bool], str]
_ID: _Rule = (
    lambda value: is_whole(value) and int(value).bit_length() <= _MOST_BITS,
    f"a whole number of at most {_MOST_BITS} bits",
)
_NAME: _Rule = (
    lambda value: isinstance(value, str) and value != "" and not _UNPRINTABLE.search(value),
    "a text of one line without control characters",
)
_SIDE: _Rule = (
    lambda value: is_whole(value) and 0 < value <= _LONGEST_SIDE,
    f"a whole number from 1 to {_LONGEST_SIDE}",
)
_BOX: _Rule = (
    _is_box,
    f"4 numbers x, y, width >= 0, height >= 0, none beyond {FARTHEST:g} pixels",
)
_AREA: _Rule = (
    # COCO's evaluation counts no larger object.
    lambda value: is_number(value) and 0 <= value <= FARTHEST**2,
    f"a number from 0 to {FARTHEST**2:g}",
)
_CROWD: _Rule = (lambda value: value in (0, 1), "0 or 1")


def _check_fields(
    source: str, kind: str, entries: list[dict[str, Any]], rules: dict[str, _Rule]
) -> None:
    for key, (accepts, right) in rules.items():
        bad = [index for index, entry in enumerate(entries) if not accepts(entry.get(key))]
        if bad:
            entry = entries[bad[0]]
            name = (
                f"{kind} {entry['id']}" if key != "id" and "id" in entry else f"{kind} no. {bad[0]}"
            )
            found = f"has {key} {entry[key]!r}" if key in entry else f"has no {key}"
            raise DatasetError(f"{name} of {source} {found}; it must be {right}{more(bad)}.")


def _check_unique(source: str, kind: str, entries: list[dict[str, Any]], key: str) -> None:
    counts: Counter[Hashable] = Counter(entry[key] for entry in entries)
    bad = [value for value, count in counts.items() if count > 1]
    if bad:
        raise DatasetError(
            f"{source} declares {kind} {key} {bad[0]!r} {counts[bad[0]]} times; "
            f"each must be unique{more(bad)}."
        )


def kind_of(value: Any) -> str:
    """How a message calls the kind of a JSON value."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else repr(value))


def more(bad: Sequence[Any]) -> str:
    """How many more entries have the same fault, for the end of a message."""
    return f" ({len(bad)} such)" if len(bad) > 1 else ""


def _listed(values: Iterable[Any]) -> str:
    ordered = sorted(values)
    listed = ", ".join(map(str, ordered[:10]))
    return f"{listed}, ... {len(ordered)} in all" if len(ordered) > 10 else listed or "none"
