"""From a config file and the tools' options to a config that is ready to run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from mmengine.config import Config, ConfigDict

from polyfocal.coco import CocoSplit, load_split
from polyfocal.demo import write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.mmdet.tiny import MAX_SIDE, leaf_datasets, use_tiny_profile, walk

DEMO_FOLDER = Path("data/digit_scenes")
"""Where ``--demo`` keeps the digit scenes, below the current directory."""

_USUAL_MAX_DETS = 100


@dataclass
class Experiment:
    """A config that is ready to run, and what a person should know about how it came to be."""

    config: Config
    notes: list[str] = field(default_factory=list)


def prepare_experiment(
    path: str | Path,
    *,
    data: str | Path | None = None,
    tiny: bool = False,
    demo: bool = False,
    options: dict[str, Any] | None = None,
) -> Experiment:
    """Read a config and adapt it to the data set and the machine.

    Args:
        path: An MMDetection 3.x config.
        data: A COCO-format folder to use in the place of the config's data set, see
            :func:`polyfocal.coco.load_split`.
        tiny: Use the CPU-sized version of the architecture, see
            :func:`polyfocal.mmdet.tiny.use_tiny_profile`.
        demo: Use the built-in digit scenes and the tiny profile.
        options: Overrides such as ``{"train_cfg.max_epochs": 10}``. They win over everything else.

    Raises:
        UserError: The config, an override or the data set is not usable.
    """
    cfg = _read_config(path)
    experiment = Experiment(cfg)
    if demo:
        data = write_digit_scenes(DEMO_FOLDER)
    side = MAX_SIDE
    if data is not None:
        splits = {name: load_split(Path(data), name) for name in ("train", "val")}
        side = min(side, _usual_side(splits["train"]))
    if demo or tiny:
        use_tiny_profile(cfg, side)
    if data is not None:
        _use_data(experiment, **splits)
    if demo:
        # A mirrored digit is another sign or none.
        for step in walk(cfg.train_dataloader.dataset):
            if step.get("type") == "RandomFlip":
                step.prob = 0.0
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--cfg-options does not fit {path}: {error}.") from error
    _check_annotations(cfg, path)
    return experiment


def _read_config(path: str | Path) -> Config:
    if not Path(path).is_file():
        raise UserError(f"there is no config {path}.")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can fail in any way
        raise UserError(
            f"{path} cannot be read as a config: {type(error).__name__}: {error}."
        ) from error
    missing = [key for key in ("model", "train_dataloader", "val_dataloader") if key not in cfg]
    if missing:
        raise UserError(f"{path} is not the config of a detector: it has no {missing[0]!r}.")
    return cfg


def _use_data(experiment: Experiment, train: CocoSplit, val: CocoSplit) -> None:
    cfg = experiment.config
    metrics = _metrics(cfg)
    if "segm" in metrics:
        for split in (train, val):
            if not split.has_masks:
                raise UserError(
                    f"{cfg.filename} predicts masks, but {split.annotation_file} has none: "
                    f"use a box detector such as RetinaNet or Faster R-CNN."
                )
    for loader, split in (("train", train), ("val", val), ("test", val)):
        dataloader = cfg[f"{loader}_dataloader"]
        dataset, *rest = leaf_datasets(dataloader.dataset)
        if rest:
            # Several data sets side by side: there is only one now.
            dataloader.dataset = dataset
        dataset.update(
            type="CocoDataset",
            data_root="",
            ann_file=str(Path(split.annotation_file).resolve()),
            data_prefix=dict(img=f"{Path(split.image_dir).resolve()}/"),
            metainfo=dict(classes=tuple(split.classes), palette="random"),
        )
    _set_num_classes(cfg.model, len(train.classes))
    evaluator = ConfigDict(
        type="CocoMetric", ann_file=str(Path(val.annotation_file).resolve()), metric=metrics
    )
    most = max(train.max_instances, val.max_instances)
    if most > _USUAL_MAX_DETS:
        limit = -(-most // 100) * 100
        _raise_max_detections(cfg.model.test_cfg, limit)
        evaluator.max_dets = limit
        experiment.notes.append(
            f"a picture of this data set holds up to {most} objects: up to {limit} detections a "
            f"picture are kept and evaluated (COCO's custom is {_USUAL_MAX_DETS})."
        )
    cfg.val_evaluator = evaluator
    cfg.test_evaluator = evaluator


def _metrics(cfg: Config) -> list[str]:
    """The kinds of evaluation that the config asks for."""
    kinds: list[str] = []
    for evaluator in walk(cfg.val_evaluator):
        metric = evaluator.get("metric", [])
        kinds += [metric] if isinstance(metric, str) else metric
    return [kind for kind in ("bbox", "segm") if kind in kinds] or ["bbox"]


def _set_num_classes(model: ConfigDict, count: int) -> None:
    """Set every ``num_classes`` of a model, but not those of a proposal network: it has one."""
    proposals = [id(node) for node in walk(model.get("rpn_head"))]
    for node in walk(model):
        if "num_classes" in node and id(node) not in proposals:
            node.num_classes = count


def _raise_max_detections(test_cfg: ConfigDict, limit: int) -> None:
    for node in (test_cfg, test_cfg.get("rcnn"), test_cfg.get("rpn")):
        if node is not None and "max_per_img" in node:
            node.max_per_img = max(node.max_per_img, limit)


def _usual_side(split: CocoSplit) -> int:
    """Median of the longer sides of a split's pictures, in pixels."""
    images = json.loads(Path(split.annotation_file).read_text(encoding="utf-8"))["images"]
    return round(median(max(image["width"], image["height"]) for image in images))


def _check_annotations(cfg: Config, path: str | Path) -> None:
    for loader in ("train_dataloader", "val_dataloader"):
        for dataset in leaf_datasets(cfg[loader].dataset):
            root = dataset.get("data_root") or ""
            file = Path(root) / dataset.ann_file
            if "://" not in str(file) and not file.is_file():
                raise UserError(
                    f"no data set: {path} wants {file}, and it is not there; give a COCO-format "
                    f"folder with --data DIR, or use the built-in pictures with --demo."
                )
