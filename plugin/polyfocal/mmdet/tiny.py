"""The profiles tiny and small: a config's architecture, to train on a CPU in minutes.

One set of rules serves every detector, by walking its config. The backbone becomes a ResNet-18 of
half the usual width from scratch (tiny), or EfficientNet-Lite0 with its ImageNet weights (small).
Every other width becomes a quarter, every number of samples an eighth, and every stack of layers at
most two deep. The pictures become small. What can be normalised is normalised.
"""

import inspect
from collections.abc import Iterator
from typing import Any

from mmcv.transforms import LoadAnnotations, LoadImageFromFile, Pad, RandomFlip
from mmdet.datasets import MultiImageMixDataset
from mmdet.datasets.transforms import PackDetInputs
from mmdet.engine.hooks import PipelineSwitchHook, YOLOXModeSwitchHook
from mmengine.config import Config, ConfigDict
from mmengine.dataset import InfiniteSampler
from mmengine.model import PretrainedInit
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    MODELS,
    TRANSFORMS,
    WEIGHT_INITIALIZERS,
)

from polyfocal import efficientnet
from polyfocal.errors import UserError
from polyfocal.mmengine import registry
from polyfocal.mmengine.configs import class_of, is_a, leaf_datasets, type_name, walk

registry.MODELS.register_module(module=efficientnet.EfficientNetLite0)

MAX_SIDE = 320
"""Longest side of a picture in pixels, if the pictures of the data set are larger."""

_BATCH = 4
_SHRINK = 4  # of widths
_QUERIES = 64  # so many a two-stage transformer chooses among the cells of a small picture
_FEWER = 8  # of proposals and samples; with all, pooling takes a third of the time on a CPU
_WIDTHS = frozenset(
    {
        "in_channels",
        "out_channels",
        "feat_channels",
        "conv_out_channels",
        "fc_out_channels",
        "embed_dims",
        "feedforward_channels",
        "num_feats",
    }
)
_DEPTHS = frozenset({"stacked_convs", "num_convs", "num_layers"})
_MAX_DEPTH = 2
_BASE_CHANNELS = 32
_RESNET18_CHANNELS = tuple(_BASE_CHANNELS * 2**stage for stage in range(4))
_CELL = 32  # pixels of the coarsest stage of both backbones
_NECK_GROUPS = 4  # of GroupNorm, on EfficientNet-Lite0
_SMALL_RATE = 3e-3  # docs/results/detection.md has what other rates gave
# From scratch, necks and heads without normalisation learn several times more slowly.
_NORM = {"type": "GN", "num_groups": 8, "requires_grad": True}


def use_tiny_profile(cfg: Config, side: int = MAX_SIDE) -> None:
    """Change a detector's config, in place, to its CPU-sized version.

    Nothing is downloaded: the weights start from scratch.

    Args:
        cfg: An MMDetection 3.x config with a model on a ResNet-like backbone.
        side: Longest side in pixels to which pictures are resized, keeping their ratio.

    Raises:
        UserError: The model has no backbone that a ResNet-18 could replace, or no neck that says
            what it reads.
    """
    stages = _shrink(cfg, side, "tiny")
    _connect(cfg.model, [_RESNET18_CHANNELS[stage] for stage in stages], "tiny")
    cfg.model.backbone = ConfigDict(
        type="mmdet.ResNet",
        depth=18,
        base_channels=_BASE_CHANNELS,
        num_stages=4,
        out_indices=stages,
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
        init_cfg=None,
    )
    # A caffe backbone's unscaled input belongs to its pretrained weights.
    cfg.model.data_preprocessor.update(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    )


def use_small_profile(cfg: Config, side: int = MAX_SIDE) -> None:
    """Change a detector's config, in place, to its CPU-sized version on a pretrained backbone.

    Args:
        cfg: An MMDetection 3.x config with a model on a ResNet-like backbone.
        side: Longest side in pixels to which pictures are resized, keeping their ratio.

    Raises:
        UserError: The weights are not installed, or the model has no backbone whose stages
            EfficientNet-Lite0 could take over, or no neck that says what it reads.
    """
    efficientnet.weights_file()
    stages = _shrink(cfg, side, "small")
    _connect(cfg.model, [efficientnet.CHANNELS[stage] for stage in stages], "small")
    # Necks that keep the backbone's widths halve them, and 20 channels are not eight groups.
    for node in walk(cfg.model.neck):
        if "num_groups" in node:
            node.num_groups = _NECK_GROUPS
    cfg.model.backbone = ConfigDict(
        type="polyfocal.EfficientNetLite0",
        out_indices=stages,
        frozen_stages=efficientnet.FROZEN_STAGES,
    )
    cfg.model.data_preprocessor.update(
        mean=[efficientnet.PIXEL_MEAN] * 3, std=[efficientnet.PIXEL_STD] * 3, bgr_to_rgb=True
    )
    cfg.optim_wrapper.optimizer.lr = _SMALL_RATE
    cfg.optim_wrapper.paramwise_cfg = ConfigDict(
        custom_keys={"backbone": dict(lr_mult=efficientnet.RATE_FACTOR)},
        bypass_duplicate=True,  # of heads whose levels share their convolutions
    )


def _shrink(cfg: Config, side: int, profile: str) -> tuple[int, ...]:
    """Everything but the backbone, which is taken out; returns the stages that it gave."""
    scope = cfg.get("default_scope")
    stages = _shrink_model(cfg.model, scope, profile)
    if any(is_a(step, TRANSFORMS, scope, Pad) for step in walk(cfg.train_dataloader)):
        # Pictures that are padded to one size may have to be whole cells of the coarsest level.
        whole = max(_CELL, cfg.model.data_preprocessor.get("pad_size_divisor", 1))
        cfg.model.data_preprocessor.pad_size_divisor = whole
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        # Small batches: from scratch, the number of steps counts.
        batch = _BATCH if loader.startswith("train") else 8
        cfg[loader].update(batch_size=batch, num_workers=1)
        if is_a(cfg[loader].dataset, DATASETS, scope, MultiImageMixDataset):
            cfg[loader].dataset = cfg[loader].dataset.dataset  # mixing is augmentation
        for dataset in leaf_datasets(cfg[loader].dataset):
            train = loader.startswith("train")
            dataset.pipeline = _pipeline(dataset.pipeline, side, scope, train=train)
    # These hooks would replace the pipeline of the profile by that of the config.
    switches = (PipelineSwitchHook, YOLOXModeSwitchHook)
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [hook for hook in hooks if not is_a(hook, HOOKS, scope, switches)]
    use_tiny_recipe(cfg, batch=_BATCH, max_epochs=12, lr=1e-3)
    for key in ("tta_model", "tta_pipeline"):
        cfg.pop(key, None)
    return stages


def use_tiny_recipe(cfg: Config, *, batch: int, max_epochs: int, lr: float) -> None:
    """Change how a detector is trained, in place, to a recipe that works from scratch.

    Args:
        cfg: The config.
        batch: Samples per iteration.
        max_epochs: Number of epochs; three evaluations are spread over them.
        lr: The highest learning rate of AdamW.
    """
    # The schedulers have no own end: they follow train_cfg.max_epochs, whoever sets it.
    cfg.train_cfg = ConfigDict(
        type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=-(-max_epochs // 3)
    )
    cfg.param_scheduler = [
        ConfigDict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=100),
        ConfigDict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, eta_min=0),
    ]
    cfg.optim_wrapper = ConfigDict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05),
        clip_grad=dict(max_norm=10, norm_type=2),
    )
    # Scaling the rate means scaling it from this recipe's batch, not from the original's.
    cfg.auto_scale_lr = ConfigDict(enable=False, base_batch_size=batch)
    # Two, so that a run that is killed while it writes one can resume from the other.
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=2, by_epoch=True)
    cfg.default_hooks.logger.interval = 10
    # The recipe counts in epochs; for a config that counts in iterations an epoch needs an end.
    sampler = cfg.train_dataloader.get("sampler")
    if is_a(sampler, DATA_SAMPLERS, cfg.get("default_scope"), InfiniteSampler):
        cfg.train_dataloader.sampler = ConfigDict(type="DefaultSampler", shuffle=True)
    if "log_processor" in cfg:
        cfg.log_processor.by_epoch = True


def _shrink_model(model: ConfigDict, scope: str | None, profile: str) -> tuple[int, ...]:
    backbone = model.get("backbone")
    stages = _stages(backbone, scope)
    if not stages:
        name = {"tiny": "a ResNet-18", "small": "EfficientNet-Lite0"}[profile]
        raise UserError(
            f"the {profile} profile replaces the backbone by {name}; the model "
            f"{type_name(model)!r} has no backbone with out_indices."
        )
    if "encoder" in model:
        # The detection transformers leave the width of their head at its default.
        model.bbox_head.setdefault("embed_dims", 256)
        if model.get("as_two_stage"):
            model.num_queries = min(model.num_queries, _QUERIES)
    # DINO's decoder encodes a coordinate in 128 numbers, whatever its width.
    widths = _WIDTHS if "dn_cfg" not in model else {"feedforward_channels"}
    del model.backbone
    # CondInst's box head predicts the parameters, num_params, of a mask head of just this size.
    fixed: dict[int, set[str]] = {}
    if "num_params" in (model.get("bbox_head") or {}):
        masks = model.mask_head
        fixed[id(masks)] = {"num_layers", "feat_channels"}
        fixed[id(masks.mask_feature_head)] = {"out_channels"}
    for node in walk(model):
        for key, value in node.items():
            if key in fixed.get(id(node), ()):
                continue
            if key in widths and isinstance(value, int):
                node[key] = value // _SHRINK
            elif key in _DEPTHS:
                node[key] = min(value, _MAX_DEPTH)
        if "sampling_ratio" in node:
            node.sampling_ratio = 1  # the adaptive number of samples costs most on a CPU
        inits = node.get("init_cfg")
        if isinstance(inits, list | tuple):
            node.init_cfg = [one for one in inits if not _is_pretrained(one, scope)]
        elif _is_pretrained(inits, scope):
            node.init_cfg = None
        if "norm_cfg" in _parameters(node, scope):
            node.norm_cfg = ConfigDict(_NORM)
    for cfg in ("train_cfg", "test_cfg"):
        for key, node in _items(model.get(cfg)):
            if key == "sampler" and "num" in node:
                node.num //= _FEWER
            elif key in ("rpn", "rpn_proposal") and "max_per_img" in node:
                node.max_per_img //= _FEWER
            if key == "rpn_proposal" and "nms_pre" in node:
                node.nms_pre //= _FEWER
    return stages


def _connect(model: ConfigDict, channels: list[int], profile: str) -> None:
    """Have the neck, the first one of several, read the channels of the new backbone's stages."""
    necks = model.get("neck")
    first = necks[0] if isinstance(necks, list | tuple) and necks else necks
    read = first.get("in_channels") if isinstance(first, dict) else None
    if isinstance(read, int):  # of the coarsest stage
        first.in_channels = channels[-1]
    elif isinstance(read, list | tuple) and len(read) == len(channels):
        coarse_first = read[0] > read[-1]  # as YOLOv3's neck reads them
        first.in_channels = channels[::-1] if coarse_first else channels
    else:
        raise UserError(
            f"the {profile} profile needs a neck whose in_channels are those of the backbone's "
            f"{len(channels)} stages; the neck of {type_name(model)!r} "
            + (f"has in_channels={read}." if first else "is missing.")
        )


def _is_pretrained(init: Any, scope: str | None) -> bool:
    return is_a(init, WEIGHT_INITIALIZERS, scope, PretrainedInit)


def _stages(backbone: ConfigDict | None, scope: str | None) -> tuple[int, ...]:
    """The stages that replace those of a backbone; none if it has no such list."""
    if backbone is None:
        return ()
    stages = backbone.get("out_indices")
    if stages is None:
        module = class_of(backbone, MODELS, scope)
        parameter = inspect.signature(module).parameters.get("out_indices") if module else None
        stages = () if parameter is None else parameter.default
    # CSPNeXt counts its stem: its last stage is 4.
    beyond = max(0, max(stages, default=0) - (len(_RESNET18_CHANNELS) - 1))
    return tuple(stage - beyond for stage in stages)


def _parameters(node: ConfigDict, scope: str | None) -> set[str]:
    """The keywords of the module that a dictionary describes."""
    module = class_of(node, MODELS, scope)
    return set(inspect.signature(module).parameters) if module else set()


def _items(node: Any) -> Iterator[tuple[str, ConfigDict]]:
    """Every (key, dictionary) pair in a config tree."""
    for parent in walk(node):
        for key, value in parent.items():
            if isinstance(value, dict):
                yield key, value


def _pipeline(
    pipeline: list[ConfigDict], side: int, scope: str | None, *, train: bool
) -> list[ConfigDict]:
    """Load, resize, flip (train only), pack: what the config loads, at the profile's size."""
    steps = [step for step in walk(pipeline) if "type" in step]

    def of(kind: type) -> list[ConfigDict]:
        return [step for step in steps if is_a(step, TRANSFORMS, scope, kind)]

    annotations = of(LoadAnnotations)[:1]
    # Keeps steps that read other files, such as proposals, also by a reader of the user's own.
    load = [
        step for step in steps if type_name(step).startswith("Load") and step not in annotations
    ]
    load = load or of(LoadImageFromFile) or [ConfigDict(type="LoadImageFromFile")]
    annotations = annotations or [ConfigDict(type="mmdet.LoadAnnotations", with_bbox=True)]
    resize = ConfigDict(type="mmdet.Resize", scale=(side, side), keep_ratio=True)
    pack = of(PackDetInputs)[:1] or [ConfigDict(type="mmdet.PackDetInputs")]
    if train:
        return [*load, *annotations, resize, *of(RandomFlip)[:1], *pack]
    return [*load, resize, *annotations, *pack]
