"""Which format is this? Names what a folder or a file holds that is not in COCO's format."""

import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polyfocal.data.files import DatasetError, read_json, xml_kind

ROBOFLOW = "_annotations.coco.json"
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "class.names")
"""Where YOLO's tools write the names of the classes, one per line."""

Kind = Literal["roboflow", "yolo", "voc", ""]

_DEEPEST = 4  # folders below the one that is given
_LARGEST = 64 << 20  # bytes of a JSON file that is opened only to say what it is
_HEAD = 4096  # bytes that tell what a text file is
_LOOKED_AT = 20  # files of a kind that are opened
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_YOLO_LINE = re.compile(rf"\d+(?:\.0*)?(?:[eE]\+?00)?(?:\s+{_NUMBER}){{4,}}\s*")
_DOTA_LINE = re.compile(rf"(?:{_NUMBER}\s+){{8}}\S+(?:\s+[012])?\s*")
_VISDRONE_LINE = re.compile(r"-?\d+(?:,-?\d+){7},?\s*")
_EXPORT = "export it as COCO instead"


@dataclass(frozen=True)
class Layout:
    """What a folder or a file holds.

    Attributes:
        what: A noun for it.
        file: The file that gave it away.
        advice: What to do about it, the end of a sentence. Empty if ``polyfocal convert`` reads it.
        kind: Which reader of ``polyfocal convert`` reads it; empty if none does.
    """

    what: str
    file: Path
    advice: str = ""
    kind: Kind = ""

    def to_do(self, place: Path) -> str:
        """What a person who has this at a place should do, the end of a sentence."""
        if not self.kind:
            return self.advice
        folder = place if place.is_dir() else place.parent
        words = (str(folder), f"{folder.resolve()}_coco")
        return f"convert it: polyfocal convert {' '.join(map(shlex.quote, words))}"


def recognise(place: Path) -> Layout | None:
    """What a folder or a file holds; None if it is nothing that is known.

    Args:
        place: A folder, of which four levels are looked at, or a file.
    """
    if place.is_file():
        return _of_file(place)
    files = list(files_below(place, _DEEPEST))
    by_suffix: dict[str, list[Path]] = {}
    for file in files:
        by_suffix.setdefault(file.suffix.lower(), []).append(file)
    for file in by_suffix.get(".json", ()):
        if file.name == ROBOFLOW:
            return Layout("a Roboflow export in COCO's format", file, kind="roboflow")
    for suffixes in ((".yaml", ".yml", ".data"), (".xml",), (".txt",), (".json", ".csv")):
        for suffix in suffixes:
            for file in by_suffix.get(suffix, ())[:_LOOKED_AT]:
                found = _of_file(file)
                if found is not None:
                    return found
    places = {file.relative_to(place).parts[0] for file in files}
    if {"ImageSets", "training"} <= places:
        return Layout("KITTI's layout", place / "training", "take a config of MMDetection3D for it")
    for suffix in (".tfrecord", ".zip", ".tar", ".gz"):
        for file in by_suffix.get(suffix, ()):
            return _of_file(file)
    return None


def files_below(folder: Path, deepest: float = math.inf) -> Iterator[Path]:
    """The files of a folder and of those in it, in order, without hidden ones.

    Args:
        folder: The folder; one that links lead to several times is entered once.
        deepest: How many folders below it are looked into.
    """
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may make a circle
            folders.clear()
            continue
        seen.add(real)
        here = Path(place)
        deep = len(here.relative_to(folder).parts)
        folders[:] = sorted(
            name for name in folders if deep < deepest and name[0] != "." and name != "__MACOSX"
        )
        yield from (here / name for name in sorted(names) if name[0] != ".")


def foreign_json(content: Any) -> tuple[str, str] | None:
    """What a JSON file is, and what to do about it, if it is no COCO file but one that is known.

    Args:
        content: The file's content.
    """
    if isinstance(content, dict):
        return _foreign_object(content)
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return _foreign_list(content[0])
    return None


def _foreign_object(content: dict[str, Any]) -> tuple[str, str] | None:
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    if isinstance(first, dict) and "segments_info" in first:
        return (
            "a panoptic file (segments_info)",
            "a detector needs objects with boxes, as COCO's instances files have them",
        )
    if isinstance(first, dict) and "caption" in first and "bbox" not in first:
        return "a file of captions", "a detector needs objects, as COCO's instances files have them"
    if "shapes" in content and "imagePath" in content:
        return (
            "a file of labelme, which writes one per picture",
            "make one COCO file of them with labelme's labelme2coco.py",
        )
    regions = next((one for one in content.values() if isinstance(one, dict)), {})
    if "_via_img_metadata" in content or {"filename", "regions"} <= regions.keys():
        return "a file of the VGG Image Annotator", f"there, {_EXPORT}"
    if isinstance(content.get("items"), list) and "categories" in content:
        return "a file of Datumaro", f"{_EXPORT} (datum convert -f coco_instances)"
    if {"objects", "size"} <= content.keys():
        return "a file of Supervisely", f"there, {_EXPORT}"
    return None


def _foreign_list(first: dict[str, Any]) -> tuple[str, str] | None:
    if "score" in first and "bbox" in first:
        return (
            "a file of detections (COCO's results format)",
            "the ground truth is an object with images, annotations and categories",
        )
    if "data" in first and ("annotations" in first or "completions" in first):
        return "a Label Studio export (JSON)", f"in Label Studio, {_EXPORT}"
    if {"annotator", "lead_time", "annotation_id"} & first.keys():
        return "a Label Studio export (JSON-MIN)", f"in Label Studio, {_EXPORT}"
    inner = first.get("annotations", first.get("labels"))
    inner = inner[0] if isinstance(inner, list) and inner and isinstance(inner[0], dict) else {}
    if "image" in first and "coordinates" in inner:
        return "a CreateML file", _EXPORT
    if "name" in first and "box2d" in inner:
        return "a file of BDD100K", "convert it with bdd100k's or scalabel's to_coco"
    return None


def _of_file(file: Path) -> Layout | None:
    suffix = file.suffix.lower()
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        return Layout("an archive", file, "unpack it")
    if suffix == ".tfrecord":
        return Layout("TensorFlow's records", file, _EXPORT)
    try:
        if suffix == ".json":
            return _of_json(file)
        with file.open("rb") as stream:
            text = stream.read(_HEAD).decode("utf-8-sig", errors="replace")
    except OSError:
        return None
    if suffix == ".xml":
        known = xml_kind(text)
        if known is None:
            return None
        what, advice = known
        return Layout(what, file, advice, "" if advice else "voc")
    if suffix in (".yaml", ".yml"):
        keys = set(re.findall(r"^(\w+)\s*:", text, re.MULTILINE))
        # Anything may follow the names of thousands of classes.
        if "names" in keys and keys & {"train", "val", "test", "nc", "path"}:
            return Layout("a YOLO data set", file, kind="yolo")
    if suffix == ".data" and re.search(r"^\s*names\s*=", text, re.MULTILINE):
        return Layout("a YOLO data set", file, kind="yolo")
    if suffix == ".txt":
        return _of_text(file, text)
    if suffix == ".csv" and file.parent.name != "ImageSets":
        head = {word.strip().lower() for word in text.partition("\n")[0].split(",")}
        if {"xmin", "ymax"} <= head or "labelname" in head or file.name == "_annotations.csv":
            return Layout("a table of boxes", file, "write them as COCO's JSON")
    return None


def _of_text(file: Path, text: str) -> Layout | None:
    if file.name in CLASS_FILES:
        return None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        empty = file.parent.name == "labels" or file.parent.parent.name == "labels"
        return Layout("YOLO's labels", file, kind="yolo") if empty else None
    # The second line of DOTA's first labels; the head may end within the last.
    if _YOLO_LINE.fullmatch(lines[0]):
        return Layout("YOLO's labels", file, kind="yolo")
    if _VISDRONE_LINE.fullmatch(lines[0]):
        return Layout("VisDrone's labels", file, "write them as COCO's JSON")
    if lines[0].startswith("imagesource:") or _DOTA_LINE.fullmatch(lines[0]):
        return Layout("DOTA's rotated boxes", file, "write upright boxes as COCO's JSON")
    return None


def _of_json(file: Path) -> Layout | None:
    if file.stat().st_size > _LARGEST:
        return None
    try:
        found = foreign_json(read_json(file))
    except DatasetError:
        return None
    return Layout(found[0], file, found[1]) if found else None
