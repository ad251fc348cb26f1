"""COCO-format folders: find, check once, evaluate.

:func:`load_split` turns a folder and the name of a split into the paths and numbers that a training
needs, or into one sentence that says what is wrong with the files. :func:`evaluate` is pycocotools'
COCOeval with any number of detections a picture.
"""

import contextlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Group
from rich.table import Table
from rich.text import Text

from polyfocal.data.pictures import Loader, check_pictures, usual_loader
from polyfocal.data.splits import held_out
from polyfocal.errors import UserError

_SPLIT_FOLDER = re.compile(r"(train|val|valid|validation|test|ood)(\d{4})?")
_MOST_BITS = 63  # of an id: NumPy and pycocotools keep them as int64
_LONGEST_SIDE = 65_535  # pixels, of a JPEG; pycocotools counts the pixels of a mask in 32 bits
# Beyond any picture, and small enough for areas to be finite and for pycocotools to draw polygons.
_FARTHEST = 1e5


class DatasetError(UserError):
    """A data set, or results for one, cannot be used as it is."""


@dataclass(frozen=True)
class CocoSplit:
    """One checked split of a COCO-format folder.

    Attributes:
        annotation_file: The JSON file.
        image_dir: Where the pictures are: ``image_dir / file_name`` exists for each of them.
        classes: Names of the categories in the file's order, which is the order of the labels
            that MMDetection gives them.
        category_ids: Their ids in the same order.
        num_images: Number of pictures.
        num_annotations: Number of annotations, crowds among them.
        has_masks: Every annotation that is no crowd has a usable segmentation.
        max_instances: Most annotations in one picture, crowds not counted; where it is above 100
            the customary limit of 100 detections a picture hides some.
        mask_problem: Where ``has_masks`` is False, a sentence that says why; else empty.
        notes: What else a person should know before training on it, a sentence each.
    """

    annotation_file: Path
    image_dir: Path
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    num_images: int
    num_annotations: int
    has_masks: bool
    max_instances: int
    mask_problem: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CocoResult:
    """What COCOeval measured, in [0, 1]; NaN where there is no ground truth of that kind.

    Attributes:
        stats: ``mAP mAP_50 mAP_75 mAP_s mAP_m mAP_l AR@1 AR@10 AR@{max_dets} AR_s AR_m AR_l``.
            Everything but AR@1 and AR@10 is at ``max_dets`` detections a picture.
        per_class: mAP by the name of the category.
        precision: The mean over the categories that have objects, at the IoU thresholds 0.5, 0.55,
            ..., 0.95 and the recalls 0, 0.01, ..., 1, (10, 101); NaN without objects.
    """

    stats: dict[str, float]
    per_class: dict[str, float]
    precision: NDArray[np.float64] = field(repr=False, compare=False)


def load_split(folder: str | Path, split: str, load: Loader | None = None) -> CocoSplit:
    """Find one split of a COCO-format folder and check its files.

    The annotations are ``annotations/{split}.json`` or
    ``annotations/instances_{split}2017.json``. The pictures are looked for in the customary places
    (``images/{split}``, ``{split}2017``, ``images``, ...), then anywhere under the folder.
    Pictures are looked at as :func:`polyfocal.data.pictures.check_pictures` does.

    Boxes without width or height are let through: real sets hold some, and MMDetection drops them.

    Args:
        folder: The data set's folder.
        split: Name of the split, such as ``"train"``.
        load: What the training will load pictures with; where it is None, OpenCV as MMDetection
            uses it, or Pillow as Detectron2 uses it where there is no OpenCV.

    Raises:
        DatasetError: Something is missing, contradicts itself or cannot be read; the sentence
            names the file, the value and what would be right.
    """
    folder = Path(folder)
    file = _annotation_file(folder, split)
    content = _read_annotations(file)
    images, annotations = content["images"], content["annotations"]
    if not images:
        raise DatasetError(f"{file} lists no pictures; the {split} split needs at least one.")
    _check_something_to_learn(file, annotations)
    image_dir = _image_dir(folder, split, file, [image["file_name"] for image in images])
    notes = _check_pictures(file, image_dir, images, load or usual_loader())
    objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
    mask_problem = _mask_problem(file, objects, images)
    return CocoSplit(
        annotation_file=file,
        image_dir=image_dir,
        classes=tuple(category["name"] for category in content["categories"]),
        category_ids=tuple(category["id"] for category in content["categories"]),
        num_images=len(images),
        num_annotations=len(annotations),
        has_masks=not mask_problem,
        max_instances=max(Counter(object_["image_id"] for object_ in objects).values()),
        mask_problem=mask_problem,
        notes=tuple(notes),
    )


def hold_out(file: str | Path, folder: str | Path) -> tuple[Path, Path]:
    """Divide an annotation file in two by its pictures, see :func:`polyfocal.data.splits.held_out`.

    Args:
        file: COCO annotations, such as those of the train split.
        folder: Where the two files go; it is made as needed.

    Returns:
        ``kept.json``, four fifths of the pictures, and ``held_out.json``, the others.

    Raises:
        DatasetError: The file cannot be read, or one of the two would be without objects.
    """
    content = _read_annotations(Path(file))
    ids = [image["id"] for image in content["images"]]
    chosen = {id_ for id_, out in zip(ids, held_out(ids), strict=True) if out}
    parts = {}
    for name, out in (("kept", False), ("held_out", True)):
        target = Path(folder) / f"{name}.json"
        parts[target] = {
            **content,
            "images": [image for image in content["images"] if (image["id"] in chosen) == out],
            "annotations": [
                one for one in content["annotations"] if (one["image_id"] in chosen) == out
            ],
        }
        try:
            _check_something_to_learn(target, parts[target]["annotations"])
        except DatasetError as error:
            raise DatasetError(f"{file} cannot be divided: {error}") from None
    for target, part in parts.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.stem}.{os.getpid()}")
        partial.write_text(json.dumps(part), encoding="utf-8")
        os.replace(partial, target)
    kept, out_of_it = parts
    return kept, out_of_it


def evaluate(
    ground_truth: str | Path | COCO,
    results: Sequence[dict[str, Any]] | str | Path,
    iou_type: Literal["bbox", "segm"] = "bbox",
    max_dets: int = 100,
    category_ids: Sequence[int] | None = None,
) -> CocoResult:
    """Measure average precision and recall as COCO does.

    pycocotools' own summary is right for 100 detections a picture only; here every number is taken
    from its precision and recall tables at ``max_dets``.

    Args:
        ground_truth: An annotation file, or one loaded by pycocotools (left unchanged).
        results: Detections in COCO's results format, or a JSON file of them: ``image_id``,
            ``category_id``, ``score`` and ``bbox`` (x, y, width, height in pixels) or
            ``segmentation`` (RLE). May be empty.
        iou_type: Compare boxes or masks.
        max_dets: Most detections counted of a category in a picture, those of the highest score;
            at least 10.
        category_ids: Only these categories; all by default.

    Raises:
        DatasetError: The results do not fit the ground truth.
    """
    if max_dets < 10:
        raise DatasetError(f"max_dets must be 10 or more, got {max_dets!r}.")
    content, source = read_ground_truth(ground_truth, iou_type, category_ids)
    names = {category["id"]: category["name"] for category in content["categories"]}
    detected = read_results(results, iou_type, content, source)

    with contextlib.redirect_stdout(io.StringIO()):
        # COCOeval writes into the annotations it is given, and takes the id 0 for "no match".
        truth = _coco(
            content,
            [{**one, "id": number} for number, one in enumerate(content["annotations"], start=1)],
        )
        detections = truth.loadRes(detected) if detected else _coco(content, [])
        evaluation = COCOeval(truth, detections, iou_type)
        evaluation.params.maxDets = sorted({1, 10, max_dets})
        if category_ids is not None:
            evaluation.params.catIds = list(category_ids)
        evaluation.evaluate()
        evaluation.accumulate()

    # precision: IoU threshold, recall, category, area, max_dets. recall: the same without recall.
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    stats = {
        "mAP": _mean(precision[:, :, :, 0, -1]),
        "mAP_50": _mean(precision[0, :, :, 0, -1]),
        "mAP_75": _mean(precision[5, :, :, 0, -1]),
    }
    for area, letter in enumerate("sml", start=1):
        stats[f"mAP_{letter}"] = _mean(precision[:, :, :, area, -1])
    for index, limit in enumerate(evaluation.params.maxDets):
        stats[f"AR@{limit}"] = _mean(recall[:, :, 0, index])
    for area, letter in enumerate("sml", start=1):
        stats[f"AR_{letter}"] = _mean(recall[:, :, area, -1])
    per_class = {
        names[id_]: _mean(precision[:, :, index, 0, -1])
        for index, id_ in enumerate(evaluation.params.catIds)
    }
    # -1 for a category without objects.
    known = (precision[0, 0, :, 0, -1] >= 0).nonzero()[0]
    curves = precision[:, :, known, 0, -1]
    mean = curves.mean(axis=2) if len(known) else np.full(curves.shape[:2], np.nan)
    return CocoResult(stats, per_class, mean)


def class_counts(file: str | Path) -> list[int]:
    """How many objects each category of an annotation file has, crowds left out.

    Args:
        file: COCO or LVIS annotations; only categories and annotations are read of it.

    Returns:
        The counts in the order of the file's categories, which is that of the labels.

    Raises:
        DatasetError: it cannot be read or is no such file.
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


def format_table(results: dict[str, CocoResult]) -> Group:
    """Two tables for rich to print: the statistics and the mAP of each class.

    Args:
        results: The columns by name, such as ``{"bbox": ..., "segm": ...}``.
    """

    def table(title: str, rows: list[dict[str, float]]) -> Table:
        made = Table(title=title)
        made.add_column("")
        for name in results:
            made.add_column(name, justify="right")
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(key, math.nan) for row in rows]
            made.add_row(
                Text(key), *("-" if math.isnan(value) else f"{value:.3f}" for value in values)
            )
        return made

    return Group(
        table("COCO metrics", [result.stats for result in results.values()]),
        table("mAP by class", [result.per_class for result in results.values()]),
    )


def _mean(values: NDArray[np.float64]) -> float:
    # COCOeval writes -1 where there is no ground truth.
    values = values[values > -1]
    return float(values.mean()) if values.size else math.nan


def _coco(content: dict[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {**content, "annotations": annotations}
    coco.createIndex()
    return coco


def read_ground_truth(
    ground_truth: str | Path | COCO,
    iou_type: Literal["bbox", "segm"] = "bbox",
    category_ids: Sequence[int] | None = None,
) -> tuple[dict[str, Any], str]:
    """The content of an annotation file, checked as far as an evaluation relies on it.

    Args:
        ground_truth: An annotation file, or one loaded by pycocotools.
        iou_type: Whether the boxes or the masks will be compared.
        category_ids: Categories that must be declared.

    Returns:
        The content, and what sentences call its source.

    Raises:
        DatasetError: It cannot be used.
    """
    if iou_type not in ("bbox", "segm"):
        raise DatasetError(f"iou_type must be 'bbox' or 'segm', got {iou_type!r}.")
    if isinstance(ground_truth, COCO):
        content, source = ground_truth.dataset, "the ground truth"
    else:
        content, source = _read_annotations(Path(ground_truth), pictures=False), str(ground_truth)
    declared = {category["id"] for category in content["categories"]}
    for id_ in category_ids or ():
        if id_ not in declared:
            raise DatasetError(f"category id {id_!r} is not declared in {source}.")
    if iou_type == "segm":
        problem = _mask_problem(source, content["annotations"], content["images"])
        if problem:
            raise DatasetError(problem)
    return content, source


def read_results(
    results: Sequence[dict[str, Any]] | str | Path,
    iou_type: Literal["bbox", "segm"],
    content: dict[str, Any],
    source: str,
    *,
    probabilities: bool = False,
) -> list[dict[str, Any]]:
    """Detections in COCO's results format, checked, with only the keys that are compared.

    Args:
        results: The detections, or a JSON file of them.
        iou_type: Whether they need a ``bbox`` or a ``segmentation``.
        content: The ground truth, from :func:`read_ground_truth`.
        source: What sentences call it.
        probabilities: Whether scores must be in [0, 1], beyond being finite.

    Raises:
        DatasetError: They do not fit the ground truth.
    """
    what = "the results"
    if isinstance(results, (str, Path)):
        what = str(results)
        results = read_json(Path(results))
    if not isinstance(results, Sequence):
        raise DatasetError(f"{what} must be a list of detections, got {_kind(results)}.")
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    keys = ("image_id", "category_id", "score", shape)
    sizes = _sizes(content["images"])
    names = {category["id"] for category in content["categories"]}
    checked = []
    for number, result in enumerate(results):
        where = f"detection {number} of {what}"
        if not isinstance(result, dict):
            raise DatasetError(f"{where} must be an object, got {_kind(result)}.")
        for key in keys:
            if key not in result:
                raise DatasetError(f"{where} has no {key!r}; it needs {', '.join(keys)}.")
        for key, declared in (("image_id", sizes), ("category_id", names)):
            if not isinstance(result[key], Integral) or isinstance(result[key], bool):
                raise DatasetError(
                    f"{where} has {key} {result[key]!r}; it must be a whole number, that of "
                    f"{source}."
                )
            if result[key] not in declared:
                raise DatasetError(f"{where} has {key} {result[key]!r}, not declared in {source}.")
        if not _is_number(result["score"]):
            raise DatasetError(
                f"{where} has score {result['score']!r}; it must be a finite number."
            )
        if probabilities and not 0 <= result["score"] <= 1:
            raise DatasetError(
                f"{where} has score {result['score']!r}; calibration needs a probability in [0, 1]."
            )
        # A model may predict a box turned inside out: it matches nothing, and that is all.
        if iou_type == "bbox" and not _is_finite_box(result["bbox"]):
            raise DatasetError(
                f"{where} has bbox {result['bbox']!r}; it must be 4 numbers x, y, width, height, "
                f"none beyond {_FARTHEST:g} pixels."
            )
        size = sizes[result["image_id"]]
        if iou_type == "segm" and not _is_compressed_rle(result["segmentation"], size):
            raise DatasetError(
                f"{where} has no usable segmentation; it must be a compressed RLE of size {size}."
            )
        # Left in, a box would lend its area to the mask: pycocotools prefers it.
        kept = {key: result[key] for key in keys}
        if iou_type == "bbox":
            kept["bbox"] = [float(value) for value in result["bbox"]]
        checked.append(kept)
    return checked


def _annotation_file(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise DatasetError(
            f"{folder} is not a folder; give the folder that holds annotations/{split}.json and "
            "the pictures."
        )
    names = (f"annotations/{split}.json", f"annotations/instances_{split}2017.json")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    present = sorted(file.name for file in (folder / "annotations").glob("*.json"))
    there = (
        f"annotations holds {', '.join(present)}" if present else "there is no annotations/*.json"
    )
    raise DatasetError(f"{folder} has neither {names[0]} nor {names[1]}: {there}.")


def read_json(file: Path) -> Any:
    """The content of a JSON file; a :class:`DatasetError` where it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{file} is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    except RecursionError:
        raise DatasetError(f"{file} is not a COCO file: its JSON is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from None
    except ValueError:  # Python refuses to read them, since that takes quadratic time
        raise DatasetError(
            f"{file} is not a COCO file: it has a number of thousands of digits."
        ) from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from None


def _read_annotations(file: Path, *, pictures: bool = True) -> dict[str, Any]:
    """Read an annotation file; what comes back has every key and type that others rely on.

    Args:
        file: The JSON file.
        pictures: Whether the names of the picture files are needed. MMDetection leaves them empty
            where it writes the ground truth of its own samples.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise DatasetError(
            f"{file} must hold a JSON object with images, annotations and categories, "
            f"got {_kind(content)}."
        )
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise DatasetError(f"{file} has no {key!r}; a COCO file needs a list of them.")
        if not isinstance(content[key], list):
            raise DatasetError(f"{key!r} of {file} must be a list, got {_kind(content[key])}.")
        for index, entry in enumerate(content[key]):
            if not isinstance(entry, dict):
                raise DatasetError(
                    f"entry {index} of {key!r} in {file} must be an object, got {_kind(entry)}."
                )
    images, annotations, categories = (
        content["images"],
        content["annotations"],
        content["categories"],
    )
    _check_fields(file, "category", categories, {"id": _ID, "name": _NAME})
    _check_unique(file, "category", categories, "id")
    _check_unique(file, "category", categories, "name")
    if not categories:
        raise DatasetError(f"{file} declares no categories; it needs at least one.")
    name = {"file_name": _NAME} if pictures else {}
    _check_fields(file, "image", images, {"id": _ID, **name, "width": _SIDE, "height": _SIDE})
    _check_unique(file, "image", images, "id")
    _check_fields(
        file,
        "annotation",
        annotations,
        {
            "id": _ID,
            "image_id": _ID,
            "category_id": _ID,
            "bbox": _BOX,
            "area": _AREA,
            "iscrowd": _CROWD,
        },
    )
    _check_unique(file, "annotation", annotations, "id")
    for key, declared, kind in (
        ("image_id", {image["id"] for image in images}, "pictures"),
        ("category_id", {category["id"] for category in categories}, "categories"),
    ):
        bad = [annotation for annotation in annotations if annotation[key] not in declared]
        if bad:
            raise DatasetError(
                f"annotation {bad[0]['id']} of {file} has {key} {bad[0][key]}, which is not among "
                f"the declared {kind} ({_listed(declared)}){_more(bad)}."
            )
    return content


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _is_finite_box(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple, np.ndarray))
        and len(value) == 4
        and all(_is_number(number) and abs(number) <= _FARTHEST for number in value)
    )


def _is_box(value: Any) -> bool:
    return _is_finite_box(value) and value[2] >= 0 and value[3] >= 0


# Control characters, other ends of lines, and halves of characters, which no file name holds.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_Rule = tuple[Callable[[Any], bool], str]
_ID: _Rule = (
    lambda value: type(value) is int and value.bit_length() <= _MOST_BITS,
    f"a whole number of at most {_MOST_BITS} bits",
)
_NAME: _Rule = (
    lambda value: isinstance(value, str) and value != "" and not _UNPRINTABLE.search(value),
    "a text of one line without control characters",
)
_SIDE: _Rule = (
    lambda value: type(value) is int and 0 < value <= _LONGEST_SIDE,
    f"a whole number from 1 to {_LONGEST_SIDE}",
)
_BOX: _Rule = (
    _is_box,
    f"4 numbers x, y, width >= 0, height >= 0, none beyond {_FARTHEST:g} pixels",
)
_AREA: _Rule = (lambda value: _is_number(value) and value >= 0, "a number of 0 or more")
_CROWD: _Rule = (lambda value: value in (0, 1), "0 or 1")


def _check_fields(
    file: Path, kind: str, entries: list[dict[str, Any]], rules: dict[str, _Rule]
) -> None:
    for key, (accepts, right) in rules.items():
        bad = [index for index, entry in enumerate(entries) if not accepts(entry.get(key))]
        if bad:
            entry = entries[bad[0]]
            name = (
                f"{kind} {entry['id']}" if key != "id" and "id" in entry else f"{kind} no. {bad[0]}"
            )
            found = f"has {key} {entry[key]!r}" if key in entry else f"has no {key}"
            raise DatasetError(f"{name} of {file} {found}; it must be {right}{_more(bad)}.")


def _check_unique(file: Path, kind: str, entries: list[dict[str, Any]], key: str) -> None:
    counts: Counter[Hashable] = Counter(entry[key] for entry in entries)
    bad = [value for value, count in counts.items() if count > 1]
    if bad:
        raise DatasetError(
            f"{file} declares {kind} {key} {bad[0]!r} {counts[bad[0]]} times; "
            f"each must be unique{_more(bad)}."
        )


def _check_something_to_learn(file: Path, annotations: list[dict[str, Any]]) -> None:
    if not annotations:
        raise DatasetError(f"{file} has no annotations: there is nothing to learn or to measure.")
    objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
    if not objects:
        raise DatasetError(
            f"all {len(annotations)} annotations of {file} are crowd regions (iscrowd 1): "
            "there is nothing to learn or to measure."
        )
    if all(object_["area"] <= 0 or min(object_["bbox"][2:]) < 1 for object_ in objects):
        raise DatasetError(
            f"all {len(objects)} annotated objects of {file} have no area or a box of less than "
            "one pixel: there is nothing to learn or to measure."
        )


def _image_dir(folder: Path, split: str, file: Path, names: list[str]) -> Path:
    """The folder in which the pictures are, or that in which most of the first ones are."""
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
    wanted = Path(probe[0])
    for place, _, found in os.walk(folder):
        if wanted.name not in found:
            continue
        candidate = Path(place)
        # The file name may hold folders: image_dir is what comes before them.
        if wanted.parts != candidate.joinpath(wanted.name).parts[-len(wanted.parts) :]:
            continue
        for _ in wanted.parts[1:]:
            candidate = candidate.parent
        parts = candidate.relative_to(folder).parts
        if not any(_SPLIT_FOLDER.fullmatch(part) and not part.startswith(split) for part in parts):
            return candidate
    looked = ", ".join(name or "the folder itself" for name in customary)
    raise DatasetError(
        f"the pictures of {file} are not under {folder}: {probe[0]!r} was looked for in {looked} "
        "and in every other folder there."
    )


def _check_pictures(
    file: Path, image_dir: Path, images: list[dict[str, Any]], load: Loader
) -> list[str]:
    """Remarks on the pictures; a :class:`DatasetError` where one cannot be used."""
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


def _sizes(images: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Height and width of each picture by its id, in the order of an RLE's size."""
    return {image["id"]: [image["height"], image["width"]] for image in images}


def _mask_problem(
    source: str | Path, annotations: list[dict[str, Any]], images: list[dict[str, Any]]
) -> str:
    sizes = _sizes(images)
    bad = [
        annotation
        for annotation in annotations
        if not _is_segmentation(annotation.get("segmentation"), sizes[annotation["image_id"]])
    ]
    if not bad:
        return ""
    return (
        f"annotation {bad[0]['id']} of {source} has no usable segmentation; a mask is a list of "
        f"polygons of 3 points or more, or an RLE of the picture's size{_more(bad)}."
    )


def _is_segmentation(value: Any, size: list[int]) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_polygon(polygon) for polygon in value)
    if isinstance(value, dict) and isinstance(value.get("counts"), list):
        counts = value["counts"]
        return (
            _is_size(value.get("size"), size)
            and all(type(run) is int and run >= 0 for run in counts)
            and sum(counts) == size[0] * size[1]
        )
    return _is_compressed_rle(value, size)


def _is_polygon(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(_is_number(number) and abs(number) <= _FARTHEST for number in value)
    )


def _is_size(value: Any, size: list[int]) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and list(value) == size


def _is_compressed_rle(value: Any, size: list[int]) -> bool:
    """Whether it decodes to that many pixels."""
    if not (isinstance(value, dict) and _is_size(value.get("size"), size)):
        return False
    text = value.get("counts")
    if isinstance(text, str) and text.isascii():
        text = text.encode()
    if not isinstance(text, bytes) or not text:
        return False
    # Six bits a character: five of a number, the lowest first, and whether more of them follow.
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    if codes.min() < 0 or codes.max() > 63 or codes[-1] >= 32:
        return False
    lengths = np.diff(ends, prepend=-1)
    if lengths.max() > 7:  # characters: more than 32 bits
        return False
    starts = ends - lengths + 1
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << 5 * places, starts)
    numbers -= ((codes[ends] & 16) >> 4) << 5 * lengths  # the last one holds the sign
    # From the fourth run on, what is written is the difference to the run before the last.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return bool(numbers.min() >= 0 and numbers.sum() == size[0] * size[1])


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else repr(value))


def _listed(values: Iterable[Any]) -> str:
    ordered = sorted(values)
    listed = ", ".join(map(str, ordered[:10]))
    return f"{listed}, ... {len(ordered)} in all" if len(ordered) > 10 else listed or "none"


def _more(bad: Sequence[Any]) -> str:
    return f" ({len(bad)} such)" if len(bad) > 1 else ""
