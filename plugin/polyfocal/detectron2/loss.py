"""What every class of the adapter does with its ``cls_loss``."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from omegaconf import OmegaConf
from torch import Tensor, nn

from polyfocal import losses
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss
from polyfocal.losses.quality import QualityLoss

_NO_HOOK = "since the hooks of the other bias models are MMEngine's"
_SCORES_ARE_SOFTMAX = "Detectron2's box head takes the plain softmax of the logits for scores"


def build_loss(
    cls_loss: ClassificationLoss | Mapping[str, Any], where: str, *, needs_sigmoid: bool = True
) -> ClassificationLoss:
    """A loss from the ``cls_loss`` of a config.

    Args:
        cls_loss: A loss, as Detectron2's ``instantiate`` makes it of a ``LazyCall``, or a
            dictionary as in an MMDetection config: ``type``, with or without ``polyfocal.`` in
            front, and the keywords of the loss.
        where: The class that takes the loss, for messages.
        needs_sigmoid: Whether only the sigmoid form makes sense there.

    Raises:
        UserError: ``cls_loss`` is no loss of this package, a keyword is wrong, the form does not
            fit, or the loss needs something that a training of Detectron2 does not have.
    """
    if isinstance(cls_loss, Mapping):
        cls_loss = _from_config(cls_loss, where)
    if not isinstance(cls_loss, ClassificationLoss):
        raise UserError(
            f"the cls_loss of {where} is a {type(cls_loss).__name__}: expected a loss of polyfocal"
            " or a dictionary with its type"
        )
    problem = _problem(cls_loss)
    if problem is not None:
        raise UserError(f"the cls_loss of {where} is a {type(cls_loss).__name__}, {problem}")
    if needs_sigmoid and not cls_loss.use_sigmoid:
        raise UserError(
            f"the cls_loss of {where} is a {type(cls_loss).__name__} of softmax form, but its"
            " scores are sigmoids: write use_sigmoid=True"
        )
    return cls_loss


def loss_settings(cfg: CfgNode, part: str) -> CfgNode:
    """``MODEL.<part>.CLS_LOSS`` of a yaml config.

    Raises:
        UserError: The config does not have the key, or nothing in it.
    """
    if "CLS_LOSS" not in cfg.MODEL[part]:
        raise UserError(
            f"the config has no MODEL.{part}.CLS_LOSS: call"
            " polyfocal.detectron2.add_polyfocal_config(cfg) before the file is read"
        )
    settings = cfg.MODEL[part].CLS_LOSS
    if not settings:
        raise UserError(
            f"MODEL.{part}.CLS_LOSS is empty, and the class that the config names reads it: write"
            " a loss, such as {type: FocalLoss, use_sigmoid: true}, or the name of Detectron2's own"
            " class"
        )
    return settings


def try_loss(loss: ClassificationLoss, where: str, logits: Tensor, target: Tensor) -> None:
    """Refuse a loss that would fail at the first step, such as weights for other classes.

    Args:
        loss: The loss, whose state stays as it is.
        where: The class that takes the loss, for the message.
        logits, target: In the form in which the head gives them.

    Raises:
        UserError: The loss does not take them.
    """
    tried = copy.deepcopy(loss)
    if isinstance(tried, losses.ScheduledLoss):
        tried.set_progress(0.0)
    try:
        with torch.no_grad():
            tried(logits, target, reduction_override="sum")
    except UserError as error:
        raise UserError(f"the cls_loss of {where} does not fit: {error}") from error


def register(registry: Registry, cls: type[nn.Module]) -> None:
    """Put a class in the registry of Detectron2 that has its parent, with a name of its own."""
    # Annotations are not inherited, and TorchScript reads them.
    like = {name: getattr(cls, name) for name in ("__doc__", "__module__", "__annotations__")}
    registry.register(type(f"Polyfocal{cls.__name__}", (cls,), like))


def _from_config(config: Mapping[str, Any], where: str) -> Any:
    settings = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
    name = str(settings.pop("type", None))
    try:
        return losses.LOSSES.build(name, {k: _setting(k, v) for k, v in settings.items()})
    except UserError as error:
        raise UserError(f"the cls_loss of {where}: {error}") from None


def _setting(name: str, value: Any) -> Any:
    """A setting as the loss wants it, from what a config can hold."""
    if name not in ("bias", "teacher") or not isinstance(value, dict):
        return value
    kind = value.pop("type", None)
    if str(kind).removeprefix("polyfocal.") != "ClassPriors":
        raise UserError(f"{name} has type {kind!r}: expected ClassPriors, {_NO_HOOK}")
    return losses.ClassPriors(**value)


def _problem(loss: ClassificationLoss) -> str | None:
    """Why a training of Detectron2 cannot use a loss; None if it can."""
    if isinstance(loss, losses.NoisedTopKLoss):
        return (
            f"whose scores would be nearly flat, since {_SCORES_ARE_SOFTMAX}: it is for"
            " MMDetection's RoI heads; LDAMLoss with scale=1 works here"
        )
    if isinstance(loss, QualityLoss):
        return (
            "which learns the overlap of a box with its object, but Detectron2's heads hand labels"
            " only: take Poly1FocalLoss"
        )
    if getattr(loss, "activated", False):
        return "with activated=True, but Detectron2's heads hand logits: leave activated out"
    if isinstance(loss, losses.LDAMLoss) and loss.scale != 1:
        return f"whose scores need its scale {loss.scale}, but {_SCORES_ARE_SOFTMAX}: write scale=1"
    if isinstance(loss, losses.AdaFocalLoss):
        return (
            "whose gammas move with the calibration on validation data, and the hook that measures"
            " it is MMEngine's: take DualFocalLoss or SampleDependentFocalLoss"
        )
    if isinstance(loss, losses.DebiasingLoss):
        for name in ("bias", "teacher"):
            source = getattr(loss, name, loss.bias)
            if not isinstance(source, losses.ClassPriors):
                found = "no" if source is None else f"a {type(source).__name__} as"
                return f"with {found} {name}: expected ClassPriors, {_NO_HOOK}"
    return None
