"""From a config file and the tool's options to an experiment that is ready to run."""

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from detectron2.data import DatasetCatalog, MetadataCatalog

from polyfocal.coco import CocoSplit, load_split
from polyfocal.data.evaluation import USUAL_LIMIT, detection_limit, remark_on_more
from polyfocal.demo import DEMO_FOLDER, write_digit_scenes
from polyfocal.detectron2.data import count_objects, load_picture, register_split
from polyfocal.detectron2.experiment import Data, Experiment
from polyfocal.detectron2.lazy_experiment import LazyExperiment
from polyfocal.detectron2.yaml_experiment import YamlExperiment
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.losses.class_weights import from_data, use_counts

_MOST_LISTED = 10  # classes
_MAX_SIDE = 320  # pixels, in the profiles where the pictures are larger


def prepare_experiment(request: Request) -> Experiment:
    """Read a config, a LazyConfig or yaml, and adapt it to what is asked for.

    Args:
        request: Its config is ``.py`` for a LazyConfig, ``.yaml`` for Detectron2's older kind; its
            options are words in the way of that kind, ``key=value`` or ``KEY value``; its data are
            a COCO-format folder, see :func:`polyfocal.coco.load_split`, the built-in ones digit
            scenes.

    Raises:
        UserError: The config, an override or the data set is not usable.
    """
    path = Path(request.config)
    kinds: dict[str, Callable[[Path], Experiment]] = {
        ".py": LazyExperiment,
        ".yaml": YamlExperiment,
        ".yml": YamlExperiment,
    }
    if not path.is_file():
        raise UserError(f"there is no config {path}.")
    if path.suffix not in kinds:
        raise UserError(f"{path} must end in .py (a LazyConfig) or .yaml.")
    experiment = kinds[path.suffix](path)
    data = write_digit_scenes(DEMO_FOLDER) if request.demo else request.data
    adapted = None if data is None else _load_data(experiment, Path(data), request.train)
    profiled = request.demo or request.profile is not None
    if profiled:
        side = _MAX_SIDE if adapted is None else min(_MAX_SIDE, _usual_side(adapted.val))
        small = request.profile == "small"
        (experiment.use_small_profile if small else experiment.use_tiny_profile)(side)
    if adapted is not None:
        experiment.use_data(adapted)
    if request.demo:
        # A mirrored digit is another sign or none.
        experiment.no_flip()
    experiment.finish(list(request.options), adapted, tiny=profiled)
    train_sets, test_sets = experiment.datasets()
    for name in (train_sets if request.train else []) + test_sets:
        _check_dataset(name, path)
    _use_class_weights(experiment, adapted, request.train)
    return experiment


def _use_class_weights(experiment: Experiment, data: Data | None, train: bool) -> None:
    """Replace ``class_weight="balanced"`` and the like by numbers.

    See :mod:`polyfocal.losses.class_weights`.
    """
    counts = None if data is None else data.counts
    for place, settings, kind, head in experiment.losses():
        asked = from_data(kind, settings)
        if not asked:
            continue
        if head not in ("dense", "box"):
            raise UserError(
                f"{place}.{asked[0]} asks for weights by class from the data, and a {head} does not"
                " tell classes apart: write numbers"
            )
        if train and counts is None:
            found = [count_objects(name)[1] for name in experiment.datasets()[0]]
            counts = found[0]
            for one in found[1:]:
                counts.update(one)
        default = inspect.signature(kind).parameters["use_sigmoid"].default
        use_sigmoid = bool(settings.get("use_sigmoid", default))
        background = head == "box" and not use_sigmoid
        experiment.notes += use_counts(
            settings,
            place,
            counts if train else None,
            use_sigmoid=use_sigmoid,
            background=background,
        )


def _load_data(experiment: Experiment, folder: Path, train: bool) -> Data:
    if experiment.needs_more:
        raise UserError(
            f"{experiment.path} trains {experiment.needs_more} too, which this tool does not take"
            " from a folder: take a config without, such as"
            " configs/detectron2/mask_rcnn_poly1.py, or train with Detectron2's own"
            " tools/train_net.py, where the losses work too."
        )
    splits = {
        name: load_split(folder, name, load_picture, smallest=True)
        for name in (("train", "val") if train else ("val",))
    }
    val = splits["val"]
    for split in splits.values():
        experiment.notes.extend(split.notes)
        if experiment.has_masks and not split.has_masks:
            raise UserError(
                f"{experiment.path} needs masks: {split.mask_problem} Take a config without masks"
                " for it, such as configs/detectron2/retinanet_poly1.py."
            )
        if _categories(split) != _categories(val):
            raise UserError(
                f"{split.annotation_file} and {val.annotation_file} must declare the same"
                f" categories, got {_categories(split)} and {_categories(val)}."
            )
    if train:
        experiment.notes += splits["train"].shared_with(val)
    names = {split: register_split(found) for split, found in splits.items()}
    max_dets = detection_limit(val.annotations)
    if max_dets > USUAL_LIMIT:
        experiment.notes.append(remark_on_more(val.annotations, max_dets))
    num_train, counts = 0, Counter[str]()
    if train:
        num_train, counts = count_objects(names["train"])
        experiment.notes.append(f"{counts.total()} objects are trained on: {_listed(counts)}.")
    return Data(
        train=names.get("train", ""),
        val=names["val"],
        num_train=num_train,
        num_classes=len(val.classes),
        max_dets=max_dets,
        counts=counts,
    )


def _listed(counts: Counter[str]) -> str:
    """The counts of all classes if there are few, otherwise of the rarest."""
    ordered = counts.most_common()
    if len(ordered) > _MOST_LISTED:
        rarest = ", ".join(f"{name} {count}" for name, count in ordered[: -_MOST_LISTED - 1 : -1])
        return f"{len(ordered)} classes, the rarest {rarest}"
    return ", ".join(f"{name} {count}" for name, count in ordered)


def _categories(split: CocoSplit) -> dict[int, str]:
    return dict(sorted(zip(split.category_ids, split.classes, strict=True)))


def _usual_side(name: str) -> int:
    """Median of the longer sides of a data set's pictures, in pixels."""
    return round(median(max(p["width"], p["height"]) for p in DatasetCatalog.get(name)))


def _check_dataset(name: str, path: Path) -> None:
    if name not in DatasetCatalog:
        raise UserError(
            f"{path} wants the data set {name!r}, which Detectron2's DatasetCatalog does not have:"
            " give a COCO-format folder with --data DIR."
        )
    file = MetadataCatalog.get(name).get("json_file")
    if file is None:
        raise UserError(f"the data set {name!r} of {path} is not in COCO format.")
    if "://" not in file and not Path(file).is_file():
        raise UserError(
            f"there is no data set: {path} wants {file}; give a COCO-format folder with --data DIR,"
            " or use the built-in pictures with --demo."
        )
