"""Data sets with Pascal VOC's XML files: the VOC kit's folders, Roboflow's, labelImg's."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyfocal.data.files import DatasetError, read_lines
from polyfocal.data.labelled import (
    PICTURES,
    Labelled,
    Picture,
    agree,
    coco_object,
    listed,
    measured,
    note_outlines,
    split_of,
    supervision_formats,
)
from polyfocal.data.layouts import CLASS_FILES, files_below

_LISTS = {"train": ("train", "trainval"), "val": ("val",), "test": ("test",)}  # the first there is
_ANNOTATIONS = ("annotations", "annotation", "xmls", "labels")
_OF_PICTURES = ("JPEGImages", "images", "Images", "imgs", "img")


def read_voc(source: Path) -> Labelled:
    """Read a data set with Pascal VOC's XML files.

    Args:
        source: Its folder.

    Raises:
        DatasetError: Something is missing or cannot be read; the sentence names the file.
        PackageError: supervision is not installed.
    """
    notes: list[str] = []
    files = list(files_below(source))
    pictures: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        if file.suffix.lower() in PICTURES:
            pictures[file.name].append(file)
            pictures[file.stem].append(file)
    annotations = [file for file in files if file.suffix.lower() == ".xml"]
    splits: dict[str, list[Picture]] = {}
    seen = _Seen()
    found = _split(source, annotations, notes)
    roots = {file: _parsed(file) for chosen in found.values() for file in chosen}
    said = {file: _said(root) for file, root in roots.items()}
    owners = {
        path: file for file in annotations for path in _beside(file, said.get(file, ""), pictures)
    }
    for split, chosen in found.items():
        paths = [_picture(file, said[file], pictures, owners) for file in chosen]
        splits[split] = []
        for file, path, size in zip(chosen, paths, measured(paths, notes), strict=True):
            root = roots[file]
            _check_size(file, root, path, size)
            objects = [
                _object(file, number, one, size, seen)
                for number, one in enumerate(root.findall("object"), start=1)
            ]
            entry = {"width": size[0], "height": size[1]}
            splits[split].append(Picture(path, entry, objects))
    if not seen.names:
        raise DatasetError(f"no XML file of {source} has an object.")
    names = _classes(files, seen.names)
    every = [picture for pictures_of in splits.values() for picture in pictures_of]
    for one in (one for picture in every for one in picture.objects):
        one["category_id"] = names.index(one["category_id"]) + 1
        if seen.from_zero:
            _move(one)
    used = {picture.path for picture in every}
    bare = sorted({file for same in pictures.values() for file in same} - used)
    if bare and len(used) == len(annotations):
        notes.append(
            f"{len(bare)} pictures have no XML file, such as {bare[0]}: they are left out."
        )
    if seen.difficult:
        notes.append(
            f"{seen.difficult} of {seen.objects} objects are difficult: they become crowd regions "
            "(iscrowd 1), which are neither learnt nor counted as missed."
        )
    if seen.from_zero:
        notes.append(
            f"{seen.from_zero} begins at 0, where Pascal VOC counts pixels from 1: all boxes are "
            "taken as counted from 0."
        )
    note_outlines(splits, notes)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return Labelled(categories, splits, notes)


class _Seen:
    """What was seen in all files."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.objects = self.difficult = 0
        self.from_zero = ""  # the first box that begins at 0


def _classes(files: list[Path], used: set[str]) -> list[str]:
    """The names in the order of a list of classes that has them all, else in that of letters."""
    for file in files:
        if file.name in CLASS_FILES:
            names = read_lines(file)
            if used <= set(names):
                return list(dict.fromkeys(names))
    return sorted(used)


def _split(source: Path, annotations: list[Path], notes: list[str]) -> dict[str, list[Path]]:
    """The XML files of each split: as ImageSets/Main says, or their folders, or all for train."""
    by_folder: dict[Path, list[Path]] = defaultdict(list)
    for file in annotations:
        by_folder[file.parent].append(file)
    found: dict[str, list[Path]] = defaultdict(list)
    by_lists: dict[Path, list[Path]] = defaultdict(list)
    for folder, files in by_folder.items():
        main = _main(source, folder, notes)
        if main is not None:
            by_lists[main] += files
            continue
        parts = reversed(folder.relative_to(source).parts)
        split = next(filter(None, map(split_of, parts)), "train")
        found[split] += files
    for main, files in by_lists.items():
        folder = Path(os.path.commonpath([file.parent for file in files]))
        there = _by_name(folder, files)
        named: set[Path] = set()
        for split, place in _lists(main).items():
            chosen = _named(place, there)
            if split == "test" and not any(chosen.values()):
                notes.append(f"{place} names no file of {folder}: no test split is made.")
                continue
            missing = [name for name, file in chosen.items() if file is None]
            if missing:
                raise DatasetError(
                    f"{place} names {listed(missing)}, of which {folder} has no XML file."
                )
            these = list(filter(None, chosen.values()))
            named.update(these)
            found[split] += these
        left = len(files) - len(named)
        if left:
            notes.append(f"{left} XML files of {folder} are in no list of splits: left out.")
    return {split: found[split] for split in _LISTS if found[split]}


def _main(source: Path, folder: Path, notes: list[str]) -> Path | None:
    """The ImageSets/Main of a folder of XML files: beside it, or beside one that it is in."""
    above = [one.parent for one in folder.parents if source in one.parents]
    for place in (folder.parent, *above):
        main = place / "ImageSets" / "Main"
        if _lists(main):
            return main
        if any(main.glob("*.txt")):
            names = ", ".join(f"{name}.txt" for names in _LISTS.values() for name in names)
            notes.append(f"{main} has none of {names}: its lists are not used.")
    return None


def _lists(folder: Path) -> dict[str, Path]:
    found = {}
    for split, names in _LISTS.items():
        files = [file for name in names if (file := folder / f"{name}.txt").is_file()]
        if files:
            found[split] = files[0]
    return found


def _by_name(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The XML files that a name may mean: with all, some or none of the folders before it.

    Those that are in the fewest folders come first.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(files, key=lambda one: len(one.parts)):
        parts = file.relative_to(folder).with_name(file.stem).parts
        for start in range(len(parts)):
            found["/".join(parts[start:])].append(file)
    return found


def _named(place: Path, there: dict[str, list[Path]]) -> dict[str, Path | None]:
    """The XML file of each line in a list; class lists have -1, 0 or 1 at the end of a line."""
    found = {}
    for line in read_lines(place):
        name, *last = line.rsplit(maxsplit=1)
        file = _xml_file(place, line, there)
        if file is not None or last not in (["-1"], ["0"], ["1"]):
            found[line] = file
        else:
            found[name] = _xml_file(place, name, there)
    return found


def _xml_file(place: Path, name: str, there: dict[str, list[Path]]) -> Path | None:
    """The XML file of a name, which may have a folder and an ending, as CVAT's do."""
    parts = name.replace("\\", "/").split("/")
    last = Path(parts[-1])
    stem = last.stem if last.suffix.lower() in PICTURES | {".xml"} else parts[-1]
    for end in (parts[-1], stem):
        for start in range(len(parts)):
            found = there.get("/".join([*parts[start:-1], end]), [])
            if len(found) > 1 and len(found[0].parts) == len(found[1].parts):
                raise DatasetError(
                    f"{place} names {name}, which may be {found[0]} or {found[1]}: write its "
                    "folder before it."
                )
            if found:
                return found[0]
    return None


def _parsed(file: Path) -> Any:
    supervision_formats()  # which brings defusedxml; says what to install
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, parse

    try:
        root = parse(file).getroot()
    except DefusedXmlException:
        raise DatasetError(f"{file} declares entities, which no label needs: refused.") from None
    except (ParseError, ValueError) as error:  # the latter for encodings
        raise DatasetError(f"{file} is not valid XML: {error}.") from None
    if root.tag != "annotation":
        raise DatasetError(f"{file} is no file of Pascal VOC: its element is {root.tag!r}.")
    return root


def _said(root: Any) -> str:
    """The name of its picture that an XML file gives."""
    return (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]


def _named_alike(file: Path, said: str, pictures: dict[str, list[Path]]) -> Iterator[list[Path]]:
    """The pictures of an XML file's name; then those of the name that it gives."""
    for name in (file.stem, said, said.rpartition(".")[0]):
        yield pictures.get(name, [])


def _beside(file: Path, said: str, pictures: dict[str, list[Path]]) -> list[Path]:
    """Those that are where the picture of an XML file should be."""
    near = _near(file)
    every = (
        [one for one in same if one.parent in near] for same in _named_alike(file, said, pictures)
    )
    return next(filter(None, every), [])


def _picture(
    file: Path, said: str, pictures: dict[str, list[Path]], owners: dict[Path, Path]
) -> Path:
    """The picture of an XML file: beside it; else one elsewhere that no other XML file is for."""
    found = _beside(file, said, pictures)
    if not found:
        others = next(filter(None, _named_alike(file, said, pictures)), [])
        found = [one for one in others if owners.get(one, file) == file]
        if others and not found:
            raise DatasetError(
                f"{file} has no picture: {others[0]} is the picture of {owners[others[0]]}."
            )
    if len(found) > 1 and said in [one.name for one in found]:
        found = [one for one in found if one.name == said]
    if len(found) > 1:
        raise DatasetError(f"{file} may be for {' or '.join(map(str, found))}: remove one.")
    if not found:
        raise DatasetError(
            f"{file} has no picture: neither {file.stem} with the ending of a picture nor "
            f"{said or 'a filename'} is there."
        )
    owners.setdefault(found[0], file)
    return found[0]


def _near(file: Path) -> list[Path]:
    """The folders in which the picture of an XML file should be."""
    parts = file.parent.parts
    found = [file.parent]
    for index in reversed(range(len(parts))):
        if parts[index].lower() in _ANNOTATIONS:
            before, after = parts[:index], parts[index + 1 :]
            found += [Path(*before, name, *after) for name in _OF_PICTURES]
            break
    return found


def _check_size(file: Path, root: Any, path: Path, size: tuple[int, int]) -> None:
    texts = [root.findtext(f"size/{side}") or "0" for side in ("width", "height")]
    try:
        width, height = (int(float(text)) for text in texts)
    except (ValueError, OverflowError):
        raise DatasetError(f"{file} has a size of {texts[0]} x {texts[1]}.") from None
    if width and height:  # some tools write 0
        agree(file, (width, height), path, size)


def _object(
    file: Path, number: int, element: Any, size: tuple[int, int], seen: _Seen
) -> dict[str, Any]:
    """An object whose ``category_id`` is its name for now.

    supervision takes 1 from the first corner, and not from the second: pixels are counted from 1,
    and the last one belongs to the box.
    """
    voc = supervision_formats()[1]
    alone = element.makeelement("annotation", {})
    alone.append(element)
    try:
        detections, (name,) = voc.detections_from_xml_obj(alone, [], size)
        polygons = [
            (voc.parse_polygon_points(polygon) - 1).ravel().tolist()
            for polygon in element.findall("polygon")
        ]
    except (ValueError, IndexError, OverflowError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DatasetError(f"{file}, object {number}: {reason}.") from None
    name = name.strip()
    if not name:
        raise DatasetError(f"{file}, object {number} has no name.")
    corners = [float(value) for value in detections.xyxy[0]]
    if any(-1 <= value < 0 for value in corners[:2]):
        seen.from_zero = seen.from_zero or f"object {number} of {file}"
    difficult = (element.findtext("difficult") or "").strip() == "1"
    seen.names.add(name)
    seen.objects += 1
    seen.difficult += difficult
    found = coco_object(0, corners, polygons, crowd=difficult)
    return {**found, "category_id": name}


def _move(one: dict[str, Any]) -> None:
    """Undo the step from pixels that are counted from 1."""
    left, top, width, height = one["bbox"]
    one["bbox"] = [left + 1, top + 1, width - 1, height - 1]
    if "segmentation" in one:
        one["segmentation"] = [[x + 1 for x in polygon] for polygon in one["segmentation"]]
