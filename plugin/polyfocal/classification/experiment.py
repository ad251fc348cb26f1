"""Adapts a classification config to its data: classes, counts, variants and the tiny profile."""

from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, METRICS, MODELS

from polyfocal.classification.datasets import ImageDataset
from polyfocal.classification.metrics import ClassificationMetric
from polyfocal.classification.models import Classifier
from polyfocal.data.cifar import SPLITS
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.mmengine import experiment as mmengine_experiment
from polyfocal.mmengine.class_weights import use_class_weights
from polyfocal.mmengine.configs import (
    evaluators,
    is_a,
    merge_options,
    type_name,
    walk,
    without_weights,
)

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


class Experiment(mmengine_experiment.Experiment):
    """A classification config that is ready to run."""

    @property
    def quality(self) -> list[str]:
        return ["top1", "macro_top1"]

    def hold_out(self, folder: Path) -> None:
        cfg = self.config
        for dataset in _data_sets(cfg, "train_dataloader"):
            dataset.held_out = False
        for loader in ("val_dataloader", "test_dataloader"):
            for dataset in _data_sets(cfg, loader):
                dataset.update(split="train", held_out=True)


def prepare_experiment(request: Request, cfg: Config) -> Experiment:
    """Adapt a classification config, in place, to what is asked for.

    ``cfg.data_root`` and ``cfg.variant`` (the keywords of
    :class:`polyfocal.classification.Variant`) go to every split, ``cfg.topk`` to the metric. The
    number of classes, and the training pictures of each class where the loss or the metric asks
    for them with ``class_counts=None``, are those of the data.

    Args:
        request: Its data are a folder instead of ``cfg.data_root``; the built-in ones are
            scikit-learn's digits.
        cfg: Config of the request, for a :class:`polyfocal.classification.Classifier`.

    Raises:
        UserError: The config, the data or an override are not usable.
    """
    scope = cfg.get("default_scope")
    if not is_a(cfg.model, MODELS, scope, Classifier):
        raise UserError(
            f"{cfg.filename} has default_scope = {scope!r} and model.type ="
            f" {type_name(cfg.model)!r}: expected polyfocal.Classifier, or another scope."
        )
    notes = []
    if request.profile == "tiny" or request.demo:
        use_tiny_classifier(cfg)
        notes += without_weights(cfg)
    if request.demo:
        cfg.data_root = None
        cfg.model.data_preprocessor.update(padding=1, flip=False)  # a mirrored digit is no digit
    elif request.data is not None:
        cfg.data_root = str(request.data)
    merge_options(cfg, request.options)
    root = cfg.get("data_root")
    if root is not None and not Path(root).is_dir():
        raise UserError(
            f"there is no data set: {cfg.filename} wants {root}; give a folder of CIFAR with "
            "--data DIR, or use the built-in digits with --demo."
        )
    metrics = [
        node
        for node in (*evaluators(cfg, "val"), *evaluators(cfg, "test"))
        if is_a(node, METRICS, scope, ClassificationMetric)
    ]
    for node in metrics if "topk" in cfg else ():
        node.topk = cfg.topk
    variant = cfg.get("variant") or {}
    for loader in _LOADERS:
        for dataset in _data_sets(cfg, loader):
            if dataset.split not in SPLITS:
                raise UserError(
                    f"{loader}.dataset.split={dataset.split!r}: expected train, val or ood"
                )
            dataset.update(root=root, **variant)
    train_split = _train_split(root, variant)
    cfg.model.num_classes = len(train_split.metainfo["classes"])
    loss = cfg.model.loss
    for node in (loss, loss.get("bias"), loss.get("teacher"), *metrics):
        if node and "num_classes" in node:
            node.num_classes = cfg.model.num_classes
        if node and "class_counts" in node and node.class_counts is None:
            node.class_counts = train_split.data.counts
    counts = dict(zip(train_split.data.classes, train_split.data.counts, strict=True))
    notes += use_class_weights(cfg, counts, train=request.train, background=False)
    return Experiment(cfg, notes)


def use_tiny_classifier(cfg: Config) -> None:
    """Change a classification config, in place, to its CPU-sized version.

    ResNet-8 replaces the backbone. There are 12 epochs of batches of 64: one of warm-up, then a
    cosine to 0. The loss, the data and the optimizer stay.
    """
    cfg.model.backbone = ConfigDict(type="polyfocal.CifarResNet", depth=8, base_channels=16)
    cfg.model.in_channels = 64
    for loader in _LOADERS:
        cfg[loader].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = 64
    cfg.train_cfg = ConfigDict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=12)
    cfg.param_scheduler = [
        ConfigDict(type="LinearLR", start_factor=0.05, begin=0, end=1, convert_to_iter_based=True),
        ConfigDict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, eta_min=0),
    ]
    cfg.default_hooks.checkpoint.max_keep_ckpts = 2


def _data_sets(cfg: Config, loader: str) -> list[ConfigDict]:
    """The pictures of a loader, inside whatever wrappers a config puts around them."""
    scope = cfg.get("default_scope")
    return [node for node in walk(cfg[loader].dataset) if is_a(node, DATASETS, scope, ImageDataset)]


def _train_split(root: str | None, variant: dict[str, Any]) -> ImageDataset:
    try:
        return ImageDataset(root, "train", **variant)
    except TypeError as error:
        raise UserError(f"variant={dict(variant)}: {error}.") from error
