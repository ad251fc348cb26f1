"""Data sets with YOLO's labels: Ultralytics' data.yaml, Darknet's obj.data, labelImg's folders."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from polyfocal.data.files import DatasetError, read_lines, read_numbered, read_text, true_path
from polyfocal.data.labelled import (
    PICTURES,
    Labelled,
    Picture,
    coco_object,
    listed,
    measured,
    note_outlines,
    split_of,
    supervision_formats,
)
from polyfocal.data.layouts import CLASS_FILES, files_below, recognise

_OF_PICTURES = ("images", "jpegimages")  # folders whose labels are in "labels" beside them
_NO_LABELS = frozenset(("train.txt", "val.txt", "valid.txt", "test.txt", "trainval.txt"))
_NOTHING = ("", "null", "~", "None")
_OUTSIDE = 0.01  # how far rounding takes a label out of its picture


@dataclass(frozen=True)
class _Description:
    """What is known of a data set before its labels are read.

    Attributes:
        source: Where the names of the classes are from, for messages.
        names: The name of each class number.
        places: The folders of pictures, or lists of pictures, of each split.
        keypoint_values: How many numbers follow a box.
    """

    source: Path
    names: dict[int, str]
    places: dict[str, list[Path]]
    keypoint_values: int = 0


def read_yolo(source: Path) -> Labelled:
    """Read a data set with YOLO's labels.

    Args:
        source: Its folder, or the file that describes it.

    Raises:
        DatasetError: Something is missing or cannot be read; the sentence names file and line.
        PackageError: supervision is not installed.
    """
    notes: list[str] = []
    file = source if source.is_file() else description_in(source)
    described = _described(file, notes) if file else _undescribed(source)
    splits: dict[str, list[Picture]] = {}
    seen: Counter[str] = Counter()
    for split, places in described.places.items():
        paths = [path for place in places for path in _pictures(place)]
        unique: dict[tuple[Path, Path], Path] = {}
        for path in paths:
            unique.setdefault((true_path(path), true_path(_label_file(path))), path)
        if len(unique) < len(paths):
            notes.append(f"{len(paths) - len(unique)} pictures of {split} are listed twice.")
        splits[split] = _labelled(split, list(unique.values()), described, notes, seen)
    _check_orphans(described, splits)
    if seen["extra"]:
        notes.append(
            f"{seen['extra']} labels have a number at their end, a confidence or a track id: it is "
            "left out."
        )
    if seen["keypoints"]:
        notes.append(f"the keypoints of {seen['keypoints']} objects are left out.")
    note_outlines(splits, notes)
    categories = [{"id": number + 1, "name": name} for number, name in described.names.items()]
    return Labelled(categories, splits, notes)


def description_in(folder: Path) -> Path | None:
    """The file that describes a YOLO data set: in its folder, or else in the folders below.

    Raises:
        DatasetError: There are several, and none or several of them have a usual name.
    """
    files = [
        file
        for file in files_below(folder)
        if file.suffix.lower() in (".yaml", ".yml", ".data") and recognise(file)
    ]
    highest = min((len(file.parts) for file in files), default=0)
    files = [file for file in files if len(file.parts) == highest]
    usual = [file for file in files if file.stem in ("data", "dataset", "obj")]
    if len(files) > 1 and len(usual) != 1:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise DatasetError(
            f"{folder} has several descriptions ({names}): give one of them, such as {files[0]}."
        )
    return next(iter(usual or files), None)


def _described(file: Path, notes: list[str]) -> _Description:
    """What Ultralytics' yaml file or Darknet's data file says."""
    darknet = file.suffix.lower() == ".data"
    content = _pairs(file) if darknet else _yaml(file)
    root = file.parent / _text(file, "path", content.get("path") or "").replace("\\", "/")
    roots = [root, file.parent] if root.is_dir() else [file.parent]
    names = content.get("names")
    if isinstance(names, str):  # Darknet's: a file of them
        place = _find(names, roots)
        if place is None:
            raise DatasetError(f"{file}: names is {names}, which is not there.")
        names = read_numbered(place)
    places: dict[str, list[Path]] = {}
    for key, value in content.items():
        split = split_of(key)
        if split is None or value in _NOTHING:
            continue
        for one in value if isinstance(value, list) else [value]:
            text = _text(file, key, one)
            place = _find(text, roots)
            if place is None and split == "test":
                notes.append(f"{file}: {key} is {text}, which is not there: no test split is made.")
                continue
            if place is None:
                raise DatasetError(
                    f"{file}: {key} is {text}, which is not there: it was looked for in "
                    f"{' and '.join(map(str, roots))}."
                )
            if PurePosixPath(text).is_absolute() and not Path(text).exists():
                notes.append(f"{file}: {key} is {text}, which is not there: {place} is taken.")
            places.setdefault(split, []).append(place)
    if not places:
        raise DatasetError(f"{file} has neither train nor val: nothing says where pictures are.")
    count = content.get("classes" if darknet else "nc")
    return _Description(file, _names(file, names, count), places, _keypoints(file, content))


def _yaml(file: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        supervision_formats()  # which brings PyYAML; says what to install
        raise
    try:
        # Every scalar as it is written: names such as "no" and "1" stay texts.
        content = yaml.load(read_text(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise DatasetError(f"{file}{line} is not valid YAML: {reason}.") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file} must hold names, train and val, got {type(content).__name__}.")
    return content


def _pairs(file: Path) -> dict[str, Any]:
    """Darknet's ``key = value`` lines."""
    pairs = (line.partition("=") for line in read_lines(file))
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _text(file: Path, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"{file}: {key} must be a path or a list of paths, got {value}.")
    return value


def _names(file: Path, names: Any, count: Any = None) -> dict[int, str]:
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        pairs = sorted(names.items(), key=lambda pair: int(pair[0]))
        found = {int(number): name for number, name in pairs}
    except (AttributeError, ValueError):
        raise DatasetError(
            f"{file}: names must be a list of class names, or a name for each class number."
        ) from None
    for number, name in found.items():
        if not isinstance(name, str) or not name or number < 0:
            raise DatasetError(f"{file}: the name of class {number} must be a text, got {name!r}.")
    twice = [name for name, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise DatasetError(f"{file}: two classes have the name {twice[0]!r}.")
    if count is not None and count != str(len(found)):
        raise DatasetError(f"{file} says that there are {count} classes and names {len(found)}.")
    return found


def _keypoints(file: Path, content: dict[str, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    try:
        count, each = map(int, shape if isinstance(shape, list) else ())
    except (TypeError, ValueError):
        raise DatasetError(f"{file}: kpt_shape must be two whole numbers, got {shape}.") from None
    return count * each


def _undescribed(folder: Path) -> _Description:
    """A folder without a description: the names of its folders are all that there is."""
    files = list(files_below(folder))
    named = {tuple(read_numbered(file)): file for file in files if file.name in CLASS_FILES}
    if not named:
        raise DatasetError(
            f"{folder} has YOLO's labels, but no names of the classes: write them to "
            f"{folder / 'classes.txt'}, one per line in the order of their numbers."
        )
    if len(named) > 1:
        raise DatasetError(
            f"{folder} has several lists of classes: {' and '.join(map(str, named.values()))}."
        )
    ((names, source),) = named.items()
    places: dict[str, list[Path]] = {}
    for parent in (folder / "images", folder):
        children = sorted(parent.iterdir()) if parent.is_dir() else []
        for child in children:
            split = split_of(child.name) if child.is_dir() else None
            if split is not None:
                places.setdefault(split, []).append(child)
        if places:
            break
    else:
        places["train"] = [folder / "images" if (folder / "images").is_dir() else folder]
    return _Description(source, _names(source, list(names)), places)


def _find(text: str, roots: list[Path]) -> Path | None:
    """A path that somebody wrote on another machine, or for another folder than the file's."""
    text = text.strip().replace("\\", "/")
    for root in roots:
        if (root / text).exists():
            return root / text
    parts = [part for part in PurePosixPath(text).parts if part not in ("..", "/")]
    fewest = 2 if len(parts) > 1 and parts[-1] == "images" else 1  # each split has its images
    for start in range(len(parts) - fewest + 1):
        for root in roots:
            if (root / Path(*parts[start:])).exists():
                return root / Path(*parts[start:])
    return None


def _pictures(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (file for file in files_below(place) if file.suffix.lower() in PICTURES)
        return
    if place.suffix.lower() != ".txt":
        raise DatasetError(f"{place} is neither a folder of pictures nor a list of them (.txt).")
    for number, line in enumerate(read_text(place).splitlines(), start=1):
        if not line.strip():
            continue
        found = _find(line, [place.parent])
        if found is None:
            raise DatasetError(f"{place}, line {number}: {line.strip()} is not there.")
        yield found


def _label_file(picture: Path) -> Path:
    """Where the labels of a picture are: in "labels" in place of the last "images", or beside."""
    parts = picture.parent.parts
    for index in reversed(range(len(parts))):
        if parts[index].lower() in _OF_PICTURES:
            labels = "Labels" if parts[index] == "Images" else "labels"
            folder = Path(*parts[:index], labels, *parts[index + 1 :])
            if folder.is_dir():
                return folder / f"{picture.stem}.txt"
            break
    return picture.with_suffix(".txt")


def _labelled(
    split: str, paths: list[Path], described: _Description, notes: list[str], seen: Counter[str]
) -> list[Picture]:
    where = " and ".join(map(str, described.places[split]))
    if not paths:
        raise DatasetError(f"{where} has no pictures for the {split} split.")
    labels = [_label_file(path) for path in paths]
    bare = [path for path, label in zip(paths, labels, strict=True) if not label.is_file()]
    if len(bare) == len(paths) and split != "test":
        raise DatasetError(
            f"none of the {len(paths)} pictures of {where} has labels: {labels[0]} was looked for."
        )
    if bare:
        notes.append(
            f"{len(bare)} of {len(paths)} pictures of {split} have no label file, such as "
            f"{bare[0]}: they are taken as pictures without objects."
        )
    found = []
    for path, label, size in zip(paths, labels, measured(paths, notes), strict=True):
        objects = _objects(label, size, described, seen) if label.is_file() else []
        found.append(Picture(path, {"width": size[0], "height": size[1]}, objects))
    return found


def _objects(
    file: Path, size: tuple[int, int], described: _Description, seen: Counter[str]
) -> list[dict[str, Any]]:
    rows: list[tuple[int, list[str]]] = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        words = line.split()
        if described.keypoint_values and len(words) == 5 + described.keypoint_values:
            words = words[:5]
            seen["keypoints"] += 1
        if words:
            rows.append((number, words))
    if not rows:
        return []
    found = []
    detections = _read(file, rows, size)
    for (number, words), corners, label in zip(
        rows, detections.xyxy, detections.class_id, strict=True
    ):
        if label not in described.names:
            raise DatasetError(
                f"{file}, line {number} has class {label}: {described.source} names the classes "
                f"{min(described.names)} to {max(described.names)}."
            )
        outline = len(words) > 6
        values = [float(word) for word in (words[1:] if outline else words[1:5])]
        if outline and len(values) % 2:
            values.pop()
        if not all(math.isfinite(x) and -_OUTSIDE <= x <= 1 + _OUTSIDE for x in values):
            raise DatasetError(
                f"{file}, line {number} holds {listed(words, 5)}: YOLO's numbers are parts of the "
                "picture's width and height, from 0 to 1."
            )
        seen["extra"] += len(words) > 5 and len(words) % 2 == 0
        polygons = []
        if outline:
            polygons = [[x * side for x, side in zip(values, size * len(values), strict=False)]]
        found.append(coco_object(int(label) + 1, corners, polygons))
    return found


def _read(file: Path, rows: list[tuple[int, list[str]]], size: tuple[int, int]) -> Any:
    """What supervision reads in lines; the error names the line."""
    read = supervision_formats()[0].yolo_annotations_to_detections
    lines = [" ".join(words) for _, words in rows]
    try:
        return read(lines, size, with_masks=False)
    except (ValueError, OverflowError):
        for (number, _), line in zip(rows, lines, strict=True):
            try:
                read([line], size, with_masks=False)
            except (ValueError, OverflowError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                raise DatasetError(f"{file}, line {number}: {reason}.") from None
        raise


def _check_orphans(described: _Description, splits: dict[str, list[Picture]]) -> None:
    """Refuse labels without a picture, where folders say which pictures there are."""
    if not all(place.is_dir() for places in described.places.values() for place in places):
        return
    wanted = {_label_file(one.path) for pictures in splits.values() for one in pictures}
    known = _NO_LABELS.union(CLASS_FILES)
    orphans = [
        file
        for folder in sorted({file.parent for file in wanted if file.is_file()})
        for file in sorted(folder.glob("*.txt"))
        if file not in wanted and file.name.lower() not in known and _is_label(file)
    ]
    if orphans:
        raise DatasetError(
            f"{orphans[0]} has no picture: put the picture back, or remove the file"
            + (f" ({len(orphans)} such files)." if len(orphans) > 1 else ".")
        )


def _is_label(file: Path) -> bool:
    found = recognise(file)
    return found is not None and found.kind == "yolo"
