"""From a config file and the tools' options to a config that is ready to run."""

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

from mmdet.evaluation import DumpDetResults
from mmdet.visualization.palette import get_palette
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from rich.console import RenderableType

from polyfocal.coco import CocoSplit, hold_out, load_split
from polyfocal.demo import write_digit_scenes
from polyfocal.errors import UserError
from polyfocal.mmdet.metrics import CocoMetric
from polyfocal.mmdet.pictures import draw_predictions
from polyfocal.mmdet.tiny import MAX_SIDE, leaf_datasets, use_tiny_profile, walk

DEMO_FOLDER = Path("data/digit_scenes")
"""Where ``--demo`` keeps the digit scenes, below the current directory."""

_USUAL_MAX_DETS = 100


@dataclass
class Experiment:
    """A config that is ready to run, and what a person should know about how it came to be."""

    config: Config
    notes: list[str] = field(default_factory=list)

    def tables(self, metrics: list[BaseMetric]) -> list[RenderableType]:
        """What an evaluation found, to print; nothing where there was none yet."""
        own = [metric for metric in metrics if hasattr(metric, "table")]
        return [table for metric in own if (table := metric.table()) is not None]

    per_cent: ClassVar[float] = 100.0
    """What makes per cent of the numbers of ``quality``."""

    @property
    def quality(self) -> list[str]:
        """The numbers of an evaluation, by their short names, that say how good a model is.

        The first one is what a search maximises; higher is better, below 0 is none.
        """
        kinds = reversed(_metrics(self.config))  # masks before boxes
        return [f"{kind}_{number}" for kind in kinds for number in ("mAP", "mAP_50", "mAP_75")]

    def hold_out(self, folder: Path) -> None:
        """Train on four fifths of the training split, and evaluate on the others, not on val.

        Args:
            folder: Where what tells the two parts apart goes.

        Raises:
            UserError: The training split cannot be divided.
        """
        cfg = self.config
        source, *others = leaf_datasets(cfg.train_dataloader.dataset)
        if others:
            raise UserError(
                f"{cfg.filename} trains on several data sets side by side, of which no part can be "
                "held out: give one of them with --data DIR."
            )
        root = source.get("data_root") or ""
        kept, out = hold_out(os.path.join(root, source.ann_file), folder)
        prefix = {key: os.path.join(root, value) for key, value in source.data_prefix.items()}
        for loader, file in (("train", kept), ("val", out), ("test", out)):
            for dataset in leaf_datasets(cfg[f"{loader}_dataloader"].dataset):
                dataset.update(
                    data_root="", ann_file=str(file.resolve()), data_prefix=ConfigDict(prefix)
                )
        for evaluators in (cfg.val_evaluator, cfg.test_evaluator):
            for node in walk(evaluators):
                if "ann_file" in node:
                    node.ann_file = str(out.resolve())

    def draw(self, runner: Runner) -> Path | None:
        """Draw predictions of the trained model beside the ground truth.

        Returns:
            The folder, None where nothing is drawn.
        """
        return draw_predictions(runner)

    def keep_detections(self, out: str) -> list[BaseMetric]:
        """Have a test write its detections; returns metrics to evaluate beside the config's.

        Args:
            out: ``NAME.json`` for COCO results, ``NAME.pkl`` for MMDetection's analysis tools.

        Raises:
            UserError: ``out`` ends in something else.
        """
        if out.endswith((".pkl", ".pickle")):
            return [DumpDetResults(out_file_path=out)]
        if not out.endswith(".json"):
            raise UserError(f"--out takes a name that ends in .json or .pkl, got {out}.")
        for evaluator in walk(self.config.test_evaluator):
            evaluator.outfile_prefix = out.removesuffix(".json")
        return []

    def draw_all(self, folder: str) -> None:
        """Have a test draw every sample, truth and prediction, into a folder below the run's."""
        self.config.default_hooks.visualization.update(draw=True, test_out_dir=folder)

    def use_tta(self) -> None:
        """Put the model behind MMDetection's test-time augmentation.

        Raises:
            UserError: The model predicts masks, which it does not merge.
        """
        cfg = self.config
        if any("segm" in evaluator.get("metric", ()) for evaluator in walk(cfg.test_evaluator)):
            raise UserError("--tta merges boxes, and this model predicts masks: test it without.")
        wrapper = cfg.get("tta_model") or ConfigDict(
            type="DetTTAModel",
            tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        )
        for dataset in leaf_datasets(cfg.test_dataloader.dataset):
            dataset.pipeline = cfg.get("tta_pipeline") or _flipped(dataset.pipeline)
        cfg.model = ConfigDict(**wrapper, module=cfg.model)


def _flipped(pipeline: list[ConfigDict]) -> list[ConfigDict]:
    """A test pipeline that yields each picture as it is and mirrored."""
    *steps, pack = copy.deepcopy(pipeline)
    pack.meta_keys = (*pack.meta_keys, "flip", "flip_direction")
    flips = [dict(type="RandomFlip", prob=probability) for probability in (0.0, 1.0)]
    return [*steps, ConfigDict(type="TestTimeAug", transforms=[flips, [pack]])]


def prepare_experiment(
    path: str | Path,
    *,
    data: str | Path | None = None,
    tiny: bool = False,
    demo: bool = False,
    options: dict[str, Any] | None = None,
    train: bool = True,
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
        train: Whether the train split is needed too, or only the val split.

    Raises:
        UserError: The config, an override or the data set is not usable.
    """
    cfg = read_config(path)
    experiment = Experiment(cfg)
    if demo:
        data = write_digit_scenes(DEMO_FOLDER)
    splits = {}
    if data is not None:
        splits = {
            name: load_split(data, name) for name in (("train", "val") if train else ("val",))
        }
    if demo or tiny:
        use_tiny_profile(cfg, min(MAX_SIDE, _usual_side(splits["val"])) if splits else MAX_SIDE)
    if splits:
        _use_data(experiment, **splits)
    if demo:
        # A mirrored digit is another sign or none.
        for step in walk(cfg.train_dataloader.dataset):
            if step.get("type") == "RandomFlip":
                step.prob = 0.0
    _use_own_metric(cfg)
    merge_options(cfg, options)
    _check_annotations(cfg, path, ("train", "val") if train else ("test",))
    return experiment


def read_config(path: str | Path) -> Config:
    """The config of a detector.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no config {path}.")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: it can fail in any way
        if "mmdet3d is not installed" in str(error):
            raise UserError(
                f"{path} is a config of MMDetection3D, which is not installed: run `make setup-3d`."
            ) from error
        raise UserError(
            f"{path} cannot be read as a config: {type(error).__name__}: {error}."
        ) from error
    missing = [key for key in ("model", "train_dataloader", "val_dataloader") if key not in cfg]
    if missing:
        raise UserError(f"{path} is not the config of a detector: it has no {missing[0]!r}.")
    return cfg


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Override settings of a config, in place, such as ``{"train_cfg.max_epochs": 10}``.

    Raises:
        UserError: The config has no place for one of them.
    """
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--cfg-options does not fit {cfg.filename}: {error}.") from error


def _use_data(experiment: Experiment, val: CocoSplit, train: CocoSplit | None = None) -> None:
    cfg = experiment.config
    metrics = _metrics(cfg)
    for split in (train, val):
        if split is not None and "segm" in metrics and not split.has_masks:
            raise UserError(
                f"{cfg.filename} needs masks: {split.mask_problem} Take a config without masks for "
                f"it, such as configs/retinanet_poly1.py."
            )
    if train is not None and train.classes != val.classes:
        raise UserError(
            f"{train.annotation_file} and {val.annotation_file} must declare the same categories "
            f"in the same order, got {list(train.classes)} and {list(val.classes)}."
        )
    classes = tuple(val.classes)
    # COCO's palette is told apart more easily, but it has 80 colours.
    colors = get_palette("coco" if len(classes) <= 80 else "random", len(classes))
    for loader, split in (("train", train), ("val", val), ("test", val)):
        if split is None:
            continue
        dataloader = cfg[f"{loader}_dataloader"]
        dataset, *others = leaf_datasets(dataloader.dataset)
        if others:  # data sets side by side: now there is one
            dataloader.dataset = dataset
        dataset.update(
            type="CocoDataset",
            data_root="",
            ann_file=str(split.annotation_file.resolve()),
            data_prefix=dict(img=f"{split.image_dir.resolve()}/"),
            metainfo=dict(
                classes=classes,
                palette=[tuple(map(int, color)) for color in colors[: len(classes)]],
            ),
        )
    _set_num_classes(cfg.model, len(classes))
    evaluator = ConfigDict(
        type="CocoMetric", ann_file=str(val.annotation_file.resolve()), metric=metrics
    )
    for node in walk(cfg.val_evaluator):
        if node.get("type") in ("CalibrationMetric", "polyfocal.CalibrationMetric"):
            evaluator.update({key: node[key] for key in ("type", "iou") if key in node})
    if val.max_instances > _USUAL_MAX_DETS:
        limit = -(-val.max_instances // 100) * 100
        _raise_max_detections(cfg.model.test_cfg, limit)
        evaluator.max_dets = limit
        experiment.notes.append(
            f"a picture of the val split holds up to {val.max_instances} objects: up to {limit} "
            f"detections a picture are kept and evaluated, not the customary {_USUAL_MAX_DETS}."
        )
    cfg.val_evaluator = evaluator
    cfg.test_evaluator = copy.deepcopy(evaluator)


def _use_own_metric(cfg: Config) -> None:
    for evaluators in (cfg.val_evaluator, cfg.test_evaluator):
        for node in walk(evaluators):
            if node.get("type") in ("CocoMetric", "mmdet.CocoMetric"):
                node.type = f"polyfocal.{CocoMetric.__name__}"


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


def _check_annotations(cfg: Config, path: str | Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        for dataset in leaf_datasets(cfg[f"{split}_dataloader"].dataset):
            file = os.path.join(dataset.get("data_root") or "", dataset.ann_file)
            if "://" not in file and not os.path.isfile(file):
                raise UserError(
                    f"there is no data set: {path} wants {file}; give a COCO-format folder with "
                    f"--data DIR, or use the built-in pictures with --demo."
                )
