"""COCO-format folders: finds a split, checks it once, describes it; holds a part of it out."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyfocal.data.annotations import Annotations, more, read_annotations
from polyfocal.data.files import DatasetError, identity, read_json, write_text
from polyfocal.data.layouts import recognise
from polyfocal.data.pictures import Loader, check_pictures, usual_loader
from polyfocal.data.splits import held_out, remark_on_overlap

_SPLIT_FOLDER = re.compile(r"(train|val|valid|validation|test|ood)(\d{4})?")
_BEGINS_WITH_SPLIT = re.compile(
    r"(?i:train|val|valid|validation|test|ood)(?i:ing|set|data|images|imgs|img)?(?![a-z])"
)
# With corners instead of sizes, at least this part of the boxes would leave their pictures.
_LEAVING = 0.2


@dataclass(frozen=True)
class CocoSplit:
    """One checked split of a COCO-format folder.

    Attributes:
        annotation_file: The JSON file.
        image_dir: Where the pictures are: ``image_dir / file_name`` exists for each of them.
        annotations: What the file says.
        notes: What a person should know before training on it, a sentence each.
    """

    annotation_file: Path
    image_dir: Path
    annotations: Annotations = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the categories in the file's order, which is that of MMDetection's labels."""
        return tuple(category["name"] for category in self.annotations.categories)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Their ids in the same order."""
        return tuple(category["id"] for category in self.annotations.categories)

    def check_same_classes(self, other: "CocoSplit") -> None:
        """Refuse another split whose labels mean other classes.

        Raises:
            DatasetError: It has other categories, or another order of them.
        """
        if self.classes != other.classes:
            raise DatasetError(
                f"{self.annotation_file} and {other.annotation_file} must declare the same "
                f"categories in the same order, got {list(self.classes)} and {list(other.classes)}."
            )

    def shared_with(self, val: "CocoSplit") -> list[str]:
        """A remark if pictures of this split, on which a training learns, are in val too."""
        train, other = (
            [identity(split.image_dir / image["file_name"]) for image in split.annotations.images]
            for split in (self, val)
        )
        return remark_on_overlap(train, other)

    @property
    def num_images(self) -> int:
        """Number of pictures."""
        return len(self.annotations.images)

    @property
    def num_annotations(self) -> int:
        """Number of annotations, crowds among them."""
        return len(self.annotations.annotations)

    @property
    def max_instances(self) -> int:
        """Most annotations in one picture, crowds not counted.

        Above 100, the usual limit of 100 detections per picture hides some of them.
        """
        return self.annotations.max_instances

    @property
    def has_masks(self) -> bool:
        """Every annotation has a usable segmentation."""
        return not self.mask_problem

    @property
    def mask_problem(self) -> str:
        """A sentence that says why ``has_masks`` is False; empty if it is True."""
        return self.annotations.mask_problem


def load_split(
    folder: str | Path, split: str, load: Loader | None = None, *, smallest: bool = False
) -> CocoSplit:
    """Find one split of a COCO-format folder and check its files.

    The annotations are ``annotations/{split}.json`` or
    ``annotations/instances_{split}2017.json``. The pictures are looked for in the usual places
    (``images/{split}``, ``{split}2017``, ``images``, ...), then anywhere under the folder; of
    several places there, in the one whose name holds that of the split.
    :func:`polyfocal.data.pictures.check_pictures` checks them.

    Boxes without width or height are accepted: real sets hold some, and MMDetection drops them.

    Args:
        folder: The data set's folder.
        split: Name of the split, such as ``"train"``.
        load: What the training will load pictures with. None for OpenCV as MMDetection uses it, or,
            without OpenCV, for Pillow as Detectron2 uses it.
        smallest: Whether the training uses objects without area and boxes below a pixel, as
            Detectron2's does and MMDetection's does not.

    Raises:
        DatasetError: Something is missing, contradicts itself or cannot be read; the sentence
            names the file, the value and what would be right.
    """
    folder = Path(folder)
    file = _annotation_file(folder, split)
    annotations = read_annotations(file)
    if not annotations.images:
        raise DatasetError(f"{file} lists no pictures; the {split} split needs at least one.")
    notes = [*annotations.notes, *_check_something_to_learn(annotations, smallest)]
    _check_no_corners(annotations)
    image_dir = _image_dir(folder, split, file, [one["file_name"] for one in annotations.images])
    notes += _check_pictures(file, image_dir, annotations.images, load or usual_loader())
    return CocoSplit(
        annotation_file=file,
        image_dir=image_dir,
        annotations=annotations,
        notes=tuple(notes),
    )


def hold_out(file: str | Path, folder: str | Path) -> tuple[Path, Path]:
    """Divide an annotation file in two by its pictures, see :func:`polyfocal.data.splits.held_out`.

    Args:
        file: COCO annotations, such as those of the train split.
        folder: The folder for the two files; it is made if needed.

    Returns:
        ``kept.json``, four fifths of the pictures, and ``held_out.json``, the others.

    Raises:
        DatasetError: The file cannot be read, or one of the two parts would have no objects.
    """
    whole = read_annotations(file)
    ids = [image["id"] for image in whole.images]
    chosen = {id_ for id_, out in zip(ids, held_out(ids), strict=True) if out}
    parts = {}
    for name, out in (("kept", False), ("held_out", True)):
        target = Path(folder) / f"{name}.json"
        content = {
            **whole.content,
            "images": [image for image in whole.images if (image["id"] in chosen) == out],
            "annotations": [one for one in whole.annotations if (one["image_id"] in chosen) == out],
        }
        try:
            _check_something_to_learn(Annotations(str(target), content, ()))
        except DatasetError as error:
            raise DatasetError(f"{file} cannot be divided: {error}") from None
        parts[target] = content
    Path(folder).mkdir(parents=True, exist_ok=True)
    for target, content in parts.items():
        write_text(target, json.dumps(content))
    kept, out_of_it = parts
    return kept, out_of_it


def class_counts(file: str | Path) -> list[int]:
    """How many objects each category of an annotation file has, crowds left out.

    Args:
        file: COCO or LVIS annotations; only categories and annotations are read.

    Returns:
        The counts in the order of the file's categories, which is that of the labels.

    Raises:
        DatasetError: the file cannot be read or is no such file.
    """
    content = read_json(Path(file))
    try:
        counts = {category["id"]: 0 for category in content["categories"]}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd"):
                counts[annotation["category_id"]] += 1
    except (AttributeError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{file} is not a COCO annotation file: its categories and annotations have no {error}."
        ) from None
    return list(counts.values())


def annotations_digest(folder: str | Path) -> str | None:
    """A hash of what a COCO-format folder says of train and val; None for data of another kind."""
    found = hashlib.sha256()
    try:
        for split in ("train", "val"):
            found.update(_annotation_file(Path(folder), split).read_bytes())
    except (DatasetError, OSError):
        return None
    return found.hexdigest()


def _annotation_file(folder: Path, split: str) -> Path:
    names = (f"annotations/{split}.json", f"annotations/instances_{split}2017.json")
    if not folder.is_dir():
        found = recognise(folder) if folder.is_file() else None
        about = f" It is {found.what}: {found.to_do(folder)}." if found else ""
        raise DatasetError(
            f"{folder} is not a folder; give the folder that holds {names[0]} and the pictures."
            f"{about}"
        )
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DatasetError(f"{folder} has neither {names[0]} nor {names[1]}: {_what_is_there(folder)}.")


def _what_is_there(folder: Path) -> str:
    """What kind of data set a folder without COCO's files looks like."""
    present = sorted((folder / "annotations").glob("*.json"))
    if any(recognise(file) is None for file in present):
        return f"annotations holds {', '.join(file.name for file in present)}"
    found = recognise(folder)
    if found is not None:
        return f"it holds {found.what} ({found.file.relative_to(folder)}), {found.to_do(folder)}"
    others = sorted(
        str(file.relative_to(folder)) for file in (*folder.glob("*.json"), *folder.glob("*/*.json"))
    )
    if others:
        return f"there is {', '.join(others[:3])}, put it where it is looked for"
    return "there is no annotations/*.json"


def _check_something_to_learn(found: Annotations, smallest: bool = False) -> list[str]:
    """Remarks on objects that no training can use; a :class:`DatasetError` if none can be used."""
    if not found.annotations:
        raise DatasetError(
            f"{found.source} has no annotations: there is nothing to learn or to measure."
        )
    if not found.objects:
        raise DatasetError(
            f"all {len(found.annotations)} annotations of {found.source} are crowd regions "
            "(iscrowd 1): there is nothing to learn or to measure."
        )
    every = (_why_useless(one, found.sizes, smallest) for one in found.objects)
    reasons = Counter(filter(None, every))
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    useless = sum(reasons.values())
    if useless == len(found.objects):
        raise DatasetError(
            f"all {useless} annotated objects of {found.source} are of no use ({listed}): there is "
            "nothing to learn or to measure."
        )
    if not useless:
        return []
    return [
        f"{useless} of {len(found.objects)} annotated objects of {found.source} are of no use to a "
        f"training ({listed})."
    ]


def _why_useless(one: dict[str, Any], sizes: dict[int, list[int]], smallest: bool) -> str:
    if one.get("ignore"):
        return "with ignore 1"
    x, y, width, height = one["bbox"]
    if not smallest and (one["area"] <= 0 or min(width, height) < 1):
        return "without area or with a box of less than one pixel"
    high, wide = sizes[one["image_id"]]
    if x >= wide or y >= high or x + width <= 0 or y + height <= 0:
        return "outside of their picture"
    return ""


def _check_no_corners(found: Annotations) -> None:
    """Refuse boxes that are x1, y1, x2, y2."""
    leaving = []
    for one in found.objects:
        x, y, width, height = one["bbox"]
        high, wide = found.sizes[one["image_id"]]
        if not (x <= width <= wide + 1 and y <= height <= high + 1):
            return  # no corners
        if x + width > wide + 1 or y + height > high + 1:
            leaving.append(one)
    if len(leaving) > _LEAVING * len(found.objects):
        raise DatasetError(
            f"annotation {leaving[0]['id']} of {found.source} has bbox {leaving[0]['bbox']}, which "
            "leaves its picture, and all boxes look like x1, y1, x2, y2: they must be x, y, width, "
            f"height{more(leaving)}."
        )


def _image_dir(folder: Path, split: str, file: Path, names: list[str]) -> Path:
    """The folder of the pictures, or the folder with most of the first pictures."""
    customary = (
        f"images/{split}",
        f"images/{split}2017",
        f"{split}2017",
        split,
        "images",
        "",
    )
    probe = names[:20]

    def present(candidate: Path) -> int:
        return sum(os.path.isfile(candidate / name) for name in probe)

    best = max((folder / name for name in customary), key=present)
    if present(best):
        return best
    found = list(_elsewhere(folder, split, Path(probe[0])))
    most = max(map(present, found), default=0)
    found = [place for place in found if present(place) == most]
    if len(found) > 1:
        above = os.path.commonpath(found)
        named = [one for one in found if split.lower() in str(one.relative_to(above)).lower()]
        if len(named) != 1:
            raise DatasetError(
                f"the pictures of {file} are in {found[0]} and in {found[1]}, and nothing says "
                f"which of them is for the {split} split: put its pictures into "
                f"{folder / customary[0]}."
            )
        found = named
    if found:
        return found[0]
    if "\\" in probe[0]:
        raise DatasetError(
            f"the pictures of {file} are not found: the file_name {probe[0]!r} has backslashes, "
            "write / in their place."
        )
    looked = ", ".join(name or "the folder itself" for name in customary)
    raise DatasetError(
        f"the pictures of {file} are not under {folder}: {probe[0]!r} was looked for in {looked} "
        "and in every other folder there that is not named after another split."
    )


def _elsewhere(folder: Path, split: str, wanted: Path) -> Iterator[Path]:
    """The folders that hold a picture, without those named after another split."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may make a circle
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        if wanted.name not in files:
            continue
        # The file name may hold folders: image_dir is what comes before them.
        parts, count = (Path(place) / wanted.name).relative_to(folder).parts, len(wanted.parts)
        if parts[-count:] != wanted.parts:
            continue
        if not any(_is_of_another(part, split) for part in parts[:-count]):
            yield folder.joinpath(*parts[:-count])


def _is_of_another(name: str, split: str) -> bool:
    """Whether a folder is named after another split: ``val``, ``test2017``, ``train_images``."""
    lower = name.lower()
    if _SPLIT_FOLDER.fullmatch(lower):
        return not lower.startswith(split)
    return bool(_BEGINS_WITH_SPLIT.match(name)) and split.lower() not in lower


def _check_pictures(
    file: Path, image_dir: Path, images: list[dict[str, Any]], load: Loader
) -> list[str]:
    """Remarks on the pictures; a :class:`DatasetError` if a picture cannot be used."""
    found = check_pictures(
        [image_dir / image["file_name"] for image in images],
        [(image["width"], image["height"]) for image in images],
        load,
    )
    problems = [one.problem for one in found if one.problem]
    if problems:
        raise DatasetError(f"{problems[0]}{_such_pictures(problems, file)}.")
    remarks = [one.remark for one in found if one.remark]
    return [f"{remarks[0]}{_such_pictures(remarks, file)}."] if remarks else []


def _such_pictures(bad: list[str], file: Path) -> str:
    return f" ({len(bad)} such pictures in {file.name})" if len(bad) > 1 else ""
