"""Experiments of LazyConfigs."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import CosineParamScheduler
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from polyfocal import efficientnet
from polyfocal.data.evaluation import USUAL_LIMIT
from polyfocal.detectron2.data import CocoEvaluator
from polyfocal.detectron2.experiment import (
    KEYPOINTS,
    PIXELS,
    TINY_BATCH,
    Data,
    Evaluations,
    Experiment,
    PlacedLoss,
    Recipe,
    Settings,
    available,
    default_output_dir,
    periods,
)
from polyfocal.detectron2.lazy_tree import walk
from polyfocal.detectron2.rcnn import RPN, FastRCNNOutputLayers, MaskRCNNConvUpsampleHead
from polyfocal.detectron2.small import Lite0, rate_factor
from polyfocal.errors import UserError
from polyfocal.losses import LOSSES, Loss

_SHRINK = 4  # of widths
_FEWER = 8  # of proposals and samples
_WIDTHS = ("channels", "in_channels", "out_channels")
_STACKS = ("conv_dims", "fc_dims")
_MAX_DEPTH = 2
_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


class LazyExperiment(Experiment):
    """See :class:`polyfocal.detectron2.experiment.Experiment`.

    Raises:
        UserError: The file cannot be read as the LazyConfig of a detector.
    """

    STEPS = "train.max_iter"
    BATCH = "dataloader.train.total_batch_size"
    OUTPUT = "train.output_dir"
    RATE = "optimizer.lr"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.cfg = LazyConfig.load(str(path))
        except Exception as error:  # a config is a program: it can fail in any way
            raise UserError(
                f"{path} cannot be read as a config: {type(error).__name__}: {error}."
            ) from error
        missing = [part for part in _PARTS if part not in self.cfg]
        if missing:
            raise UserError(f"{path} is not the config of a training: it has no {missing[0]!r}.")
        # Detectron2 reads it, and its own configs leave it out.
        self.cfg.train.setdefault("seed", -1)

    @property
    def has_masks(self) -> bool:
        return any("mask_head" in node for node in _walk(self.cfg.model))

    @property
    def needs_more(self) -> str:
        for part, what in (("sem_seg_head", PIXELS), ("keypoint_head", KEYPOINTS)):
            if any(node.get(part) for node in _walk(self.cfg.model)):
                return what
        return ""

    def use_tiny_profile(self, side: int) -> None:
        features = self._shrink(side, "tiny")
        model = self.cfg.model
        # 64 channels and up, as only Detectron2's ResNet-18 is: a quarter of ResNet-50's.
        model.backbone.bottom_up = L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
            out_features=features,
            freeze_at=0,
        )
        # ImageNet's, in BGR; the 1 of Detectron2's configs belongs to its pretrained weights.
        model.pixel_std = [57.375, 57.12, 58.395]

    def use_small_profile(self, side: int) -> None:
        efficientnet.weights_file()
        features = self._shrink(side, "small")
        cfg = self.cfg
        cfg.model.backbone.bottom_up = L(Lite0)(out_features=features)
        top = cfg.model.backbone.get("top_block", {})
        if "in_channels" in top and top.get("in_feature", "res5") == "res5":
            top.in_channels = efficientnet.CHANNELS[-1]
        cfg.model.pixel_mean, cfg.model.pixel_std = (
            [efficientnet.PIXEL_MEAN] * 3,
            [efficientnet.PIXEL_STD] * 3,
        )
        if "input_format" in _parameters(cfg.model):  # for its pictures of predictions
            cfg.model.input_format = "RGB"
        for loader in (cfg.dataloader.train, cfg.dataloader.test):
            loader.mapper.image_format = "RGB"
        cfg.optimizer.params.update(base_lr="${..lr}", lr_factor_func=rate_factor)

    def _shrink(self, side: int, profile: str) -> list[str]:
        """Everything but the backbone; returns the features that it is asked for."""
        features = self._shrink_model(profile)
        cfg = self.cfg
        resize = L(T.ResizeShortestEdge)(short_edge_length=side, max_size=side)
        train, test = cfg.dataloader.train, cfg.dataloader.test
        for mapper in (train.mapper, test.mapper):
            others = [
                one for one in mapper.augmentations if "Resize" not in str(one.get("_target_"))
            ]
            mapper.augmentations = [resize, *others]
        train.total_batch_size = TINY_BATCH
        train.num_workers = test.num_workers = 1
        cfg.optimizer = L(torch.optim.AdamW)(
            params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
            lr=1e-3,
            weight_decay=0.05,
        )
        # Parts of the whole, which follow max_iter.
        cfg.lr_multiplier = L(WarmupParamScheduler)(
            scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
            warmup_factor=0.05,
            warmup_length=0.05,
            warmup_method="linear",
        )
        cfg.train.init_checkpoint = ""
        cfg.train.seed = 0
        # Two, so that a run that is killed while it writes one can resume from the other.
        cfg.train.checkpointer.max_to_keep = 2
        return features

    def use_data(self, data: Data) -> None:
        cfg = self.cfg
        train, test = cfg.dataloader.train, cfg.dataloader.test
        if data.train:
            train.dataset.names = data.train
        # Reads polygons and run-length encodings alike.
        train.mapper.instance_mask_format = "bitmask"
        test.dataset.names = data.val
        evaluators = [
            node
            for node in _walk(cfg.dataloader.get("evaluator", DictConfig({})))
            if "dataset_name" in _parameters(node)
        ]
        if not evaluators:
            cfg.dataloader.evaluator = L(CocoEvaluator)(dataset_name=data.val)
            evaluators = [cfg.dataloader.evaluator]
        more = data.max_dets > USUAL_LIMIT
        for node in evaluators:
            node.dataset_name = data.val
            for key in ("max_dets", "max_dets_per_image"):
                if more and key in _parameters(node):
                    node[key] = max(node.get(key) or USUAL_LIMIT, data.max_dets)
        for node in _walk(cfg.model):
            if "num_classes" in node and not OmegaConf.is_interpolation(node, "num_classes"):
                node.num_classes = data.num_classes
            if not more:
                continue
            for key in ("max_detections_per_image", "test_topk_per_image"):
                if key in _parameters(node):
                    node[key] = max(node.get(key, 0), data.max_dets)
            if "post_nms_topk" in node:
                node.post_nms_topk[1] = max(node.post_nms_topk[1], data.max_dets)

    def no_flip(self) -> None:
        mapper = self.cfg.dataloader.train.mapper
        mapper.augmentations = [
            step for step in mapper.augmentations if step.get("_target_") is not T.RandomFlip
        ]

    def override(self, options: Sequence[str]) -> set[str]:
        keys = set()
        for option in options:
            key, equals, _ = option.partition("=")
            if not equals:
                raise UserError(f"an override of a LazyConfig is key=value, got {option!r}.")
            self._check_key(key, option)
            try:
                LazyConfig.apply_overrides(self.cfg, [option])
            except Exception as error:  # of hydra's grammar, omegaconf or Detectron2
                sentence = " ".join(str(error).split())
                raise UserError(f"{option} does not fit {self.path}: {sentence}.") from error
            keys.add(key)
        return keys

    def recipe(self) -> Recipe:
        cfg = self.cfg
        batch, rate = cfg.dataloader.train.total_batch_size, cfg.optimizer.get("lr", 0.0)
        return Recipe(cfg.train.max_iter, batch, rate)

    def use_steps(self, steps: int, planned: int, given: set[str]) -> None:
        # Warm-up and steps of lr_multiplier are parts of the whole, and follow by themselves.
        train = self.cfg.train
        train.max_iter = steps
        evaluation, checkpoint = periods(steps)
        if "train.eval_period" not in given:
            train.eval_period = evaluation
        if "train.checkpointer.period" not in given:
            train.checkpointer.period = checkpoint

    def losses(self) -> Iterator[PlacedLoss]:
        heads: dict[Any, str] = {
            FastRCNNOutputLayers: "box",
            MaskRCNNConvUpsampleHead: "mask head",
            RPN: "proposal head",
        }
        for path, node in walk(self.cfg.model):
            if "cls_loss" not in node or OmegaConf.is_interpolation(node, "cls_loss"):
                continue
            settings = node.cls_loss
            if not isinstance(settings, DictConfig):
                continue
            kind = settings.get("_target_") or settings.get("type")
            if isinstance(kind, str):
                kind = LOSSES.get(kind.rpartition(".")[2])
            if inspect.isclass(kind) and issubclass(kind, Loss):
                head = node.get("_target_")
                head = locate(head) if isinstance(head, str) else head
                found = [heads[base] for base in getattr(head, "__mro__", ()) if base in heads]
                place = ".".join(map(str, ("model", *path, "cls_loss")))
                yield PlacedLoss(place, settings, kind, (found or ["dense"])[0])

    def datasets(self) -> tuple[list[str], list[str]]:
        def names(loader: DictConfig) -> list[str]:
            found = loader.dataset.names
            return [found] if isinstance(found, str) else list(found)

        return names(self.cfg.dataloader.train), names(self.cfg.dataloader.test)

    def settings(self) -> Settings:
        train = self.cfg.train
        return Settings(
            output_dir=default_output_dir(train.output_dir, self.path),
            weights=train.init_checkpoint,
            max_iter=train.max_iter,
            eval_period=train.eval_period,
            checkpoint_period=train.checkpointer.period,
            max_to_keep=train.checkpointer.max_to_keep,
            log_period=train.log_period,
            amp=train.amp.enabled,
            device=available(train.device),
            seed=train.seed,
            ddp=OmegaConf.to_container(train.ddp),
            cudnn_benchmark=train.get("cudnn_benchmark", False),
            float32_precision=train.get("float32_precision", ""),
        )

    def dump(self) -> str:
        return LazyConfig.to_py(self.cfg)

    def build_model(self) -> nn.Module:
        return instantiate(self.cfg.model)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        self.cfg.optimizer.params.model = model
        optimizer = instantiate(self.cfg.optimizer)
        del self.cfg.optimizer.params.model
        return optimizer

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return instantiate(self.cfg.lr_multiplier)

    def build_train_loader(self) -> Iterable[Any]:
        return instantiate(self.cfg.dataloader.train)

    def build_evaluations(self) -> Evaluations:
        found = self.cfg.dataloader.evaluator
        _, (name, *_) = self.datasets()
        evaluators = [
            self._evaluator(node) for node in (found if isinstance(found, ListConfig) else [found])
        ]
        return {name: (instantiate(self.cfg.dataloader.test), evaluators)}

    @staticmethod
    def _evaluator(node: DictConfig) -> DatasetEvaluator:
        kept = {"_target_", "dataset_name", "max_dets_per_image"}
        if node.get("_target_") is COCOEvaluator and kept.issuperset(node):
            # The same numbers, and those of each class.
            return CocoEvaluator(node.dataset_name, node.get("max_dets_per_image") or USUAL_LIMIT)
        return instantiate(node)

    def _check_key(self, key: str, option: str) -> None:
        """Refuse a misspelt key, which would be added and change nothing."""
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.cfg, parent) if parent else self.cfg
        if not isinstance(node, DictConfig):
            if isinstance(node, ListConfig):
                return
            raise UserError(f"{option} does not fit {self.path}: it has no {parent or name}.")
        # A call takes keywords that are not written; one that it does not have fails when built.
        if name not in node and "_target_" not in node:
            raise UserError(
                f"{option} does not fit {self.path}: {parent or 'it'} has {', '.join(node)}."
            )

    def _shrink_model(self, profile: str) -> list[str]:
        """A quarter of all widths, an eighth of all samples; returns the backbone's features."""
        model = self.cfg.model
        bottom_up = model.get("backbone", {}).get("bottom_up")
        if bottom_up is None or "out_features" not in bottom_up:
            name = {"tiny": "a ResNet-18", "small": "EfficientNet-Lite0"}[profile]
            raise UserError(
                f"the {profile} profile replaces model.backbone.bottom_up by {name}, and"
                f" {self.path} does not have it."
            )
        features = list(bottom_up.out_features)
        for node in _walk(model):
            for key in [key for key in node if not OmegaConf.is_interpolation(node, key)]:
                value = node[key]
                if key in (*_WIDTHS, *_STACKS) and isinstance(value, int):
                    node[key] = value // _SHRINK
                elif key in _STACKS:
                    # The last of a mask head's is its deconvolution.
                    depth = _MAX_DEPTH + ("conv_norm" in _parameters(node) and key == "conv_dims")
                    node[key] = [width // _SHRINK for width in value][:depth]
                elif key == "batch_size_per_image":
                    node[key] = value // _FEWER
                elif key in ("pre_nms_topk", "post_nms_topk"):
                    node[key] = [number // _FEWER for number in value]
                elif key == "sampling_ratio":
                    node[key] = 1  # the adaptive number of samples costs most on a CPU
            # From scratch, necks and heads without normalisation learn several times more slowly.
            for key in ("norm", "conv_norm"):
                if key in _parameters(node):
                    node[key] = "GN"
        return features


def _walk(node: Any) -> Iterator[DictConfig]:
    """Every dictionary in a config tree, the outermost first."""
    return (found for _, found in walk(node))


def _parameters(node: DictConfig) -> set[str]:
    """The keywords that the class of a call takes, those of its parents too."""
    target = node.get("_target_")
    if not inspect.isclass(target):
        return set()
    return {
        name
        for cls in target.__mro__
        if "__init__" in vars(cls)
        for name in inspect.signature(vars(cls)["__init__"]).parameters
    }
