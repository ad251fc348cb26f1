"""A classification config meets its data: classes, counts, variants and the tiny profile."""

from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner

from polyfocal.classification.data import SPLITS
from polyfocal.classification.datasets import ImageDataset
from polyfocal.errors import UserError
from polyfocal.mmdet import experiment as mmdet_experiment

CLASSIFIER = "polyfocal.Classifier"

_LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


class Experiment(mmdet_experiment.Experiment):
    """A classification config that is ready to run."""

    @property
    def quality(self) -> list[str]:
        return ["top1", "macro_top1"]

    def hold_out(self, folder: Path) -> None:
        cfg = self.config
        cfg.train_dataloader.dataset.held_out = False
        for loader in ("val", "test"):
            cfg[_LOADERS[loader]].dataset.update(split="train", held_out=True)

    def draw(self, runner: Runner) -> None:
        """Nothing: a class is no picture."""

    def keep_detections(self, out: str) -> list[BaseMetric]:
        raise UserError("--out writes detections, and this config is for a classifier.")

    def draw_all(self, folder: str) -> None:
        raise UserError("--show-dir draws detections, and this config is for a classifier.")

    def use_tta(self) -> None:
        raise UserError("--tta is for detectors, and this config is for a classifier.")


def prepare_experiment(
    path: str | Path,
    *,
    data: str | Path | None = None,
    tiny: bool = False,
    demo: bool = False,
    options: dict[str, Any] | None = None,
    train: bool = True,
) -> Experiment:
    """Read a classification config and adapt it to its data set and the machine.

    ``cfg.data_root`` and ``cfg.variant`` (the keywords of
    :class:`polyfocal.classification.Variant`) go to every split, ``cfg.topk`` to the metric. The
    number of classes, and the training pictures of each class where the loss or the metric asks
    for them with ``class_counts=None``, are those of the data.

    Args:
        path: The config, of a :class:`polyfocal.classification.Classifier`.
        data: A folder in the place of ``cfg.data_root``.
        tiny: Use the CPU-sized version, see :func:`use_tiny_classifier`.
        demo: Use scikit-learn's digits and the tiny profile.
        options: Overrides; they win over everything but what the data decide.
        train: Not used: the training split says how many classes there are.

    Raises:
        UserError: The config, the data or an override are not usable.
    """
    cfg = mmdet_experiment.read_config(path)
    if cfg.model.get("type") != CLASSIFIER:
        raise UserError(
            f"{path} has default_scope = {cfg.default_scope!r} and model.type ="
            f" {cfg.model.get('type')!r}: expected {CLASSIFIER}, or another scope."
        )
    if tiny or demo:
        use_tiny_classifier(cfg)
    if demo:
        cfg.data_root = None
        cfg.model.data_preprocessor.update(padding=1, flip=False)  # a mirrored digit is no digit
    elif data is not None:
        cfg.data_root = str(data)
    mmdet_experiment.merge_options(cfg, options)
    root = cfg.get("data_root")
    if root is not None and not Path(root).is_dir():
        raise UserError(
            f"there is no data set: {cfg.filename} wants {root}; give a folder of CIFAR with "
            "--data DIR, or use the built-in digits with --demo."
        )
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.topk = cfg.topk
    variant = cfg.get("variant") or {}
    for loader in _LOADERS.values():
        dataset = cfg[loader].dataset
        if dataset.split not in SPLITS:
            raise UserError(f"{loader}.dataset.split={dataset.split!r}: expected train, val or ood")
        dataset.update(root=root, **variant)
    train_split = _train_split(root, variant)
    cfg.model.num_classes = len(train_split.metainfo["classes"])
    loss = cfg.model.loss
    for node in (
        loss,
        loss.get("bias"),
        loss.get("teacher"),
        cfg.val_evaluator,
        cfg.test_evaluator,
    ):
        if node and "num_classes" in node:
            node.num_classes = cfg.model.num_classes
        if node and "class_counts" in node and node.class_counts is None:
            node.class_counts = train_split.data.counts
    return Experiment(cfg)


def use_tiny_classifier(cfg: Config) -> None:
    """Change a classification config, in place, to its CPU-sized version.

    ResNet-8 in the place of the backbone, 12 epochs of batches of 64, one of warm-up, then a cosine
    to 0. The loss, the data and the optimizer stay.
    """
    cfg.model.backbone = ConfigDict(type="polyfocal.CifarResNet", depth=8, base_channels=16)
    cfg.model.in_channels = 64
    for loader in _LOADERS.values():
        cfg[loader].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = 64
    cfg.train_cfg = ConfigDict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=12)
    cfg.param_scheduler = [
        ConfigDict(type="LinearLR", start_factor=0.05, begin=0, end=1, convert_to_iter_based=True),
        ConfigDict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, eta_min=0),
    ]
    cfg.default_hooks.checkpoint.max_keep_ckpts = 2


def _train_split(root: str | None, variant: dict[str, Any]) -> ImageDataset:
    try:
        return ImageDataset(root, "train", **variant)
    except TypeError as error:
        raise UserError(f"variant={dict(variant)}: {error}.") from error
