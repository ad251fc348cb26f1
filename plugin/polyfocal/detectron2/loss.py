"""What every class of the adapter does with its ``cls_loss``."""

from collections.abc import Mapping
from typing import Any

from fvcore.common.registry import Registry
from omegaconf import OmegaConf
from torch import nn

from polyfocal import losses
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss

_LOSSES = {
    loss.__name__: loss
    for loss in (
        losses.FocalLoss,
        losses.Poly1FocalLoss,
        losses.Poly1CrossEntropyLoss,
        losses.PolyNLoss,
        losses.CyclicalFocalLoss,
        losses.DualFocalLoss,
        losses.SampleDependentFocalLoss,
    )
}


def build_loss(
    cls_loss: ClassificationLoss | Mapping[str, Any], where: str, *, needs_sigmoid: bool = True
) -> ClassificationLoss:
    """A loss from what a config holds for ``cls_loss``.

    Args:
        cls_loss: A loss, which is what Detectron2's ``instantiate`` makes of a ``LazyCall``, or a
            dictionary as in an MMDetection config: ``type``, with or without ``polyfocal.`` in
            front, and the keywords of the loss.
        where: Who asks, for the sentences of errors.
        needs_sigmoid: Whether only the sigmoid form makes sense there.

    Raises:
        UserError: It is no loss of this package, a keyword is wrong, or the form does not fit.
    """
    if isinstance(cls_loss, Mapping):
        settings = OmegaConf.to_container(OmegaConf.create(dict(cls_loss)), resolve=True)
        name = settings.pop("type", None)
        loss = _LOSSES.get(str(name).removeprefix("polyfocal."))
        if loss is None:
            raise UserError(
                f"the cls_loss of {where} has type {name!r}: expected one of {', '.join(_LOSSES)}"
            )
        try:
            cls_loss = loss(**settings)
        except TypeError as error:
            raise UserError(f"the cls_loss of {where} cannot be built: {error}") from None
    if not isinstance(cls_loss, ClassificationLoss):
        raise UserError(
            f"the cls_loss of {where} is a {type(cls_loss).__name__}: expected a loss of polyfocal"
            " or a dictionary with its type"
        )
    if isinstance(cls_loss, losses.NoisedTopKLoss):
        raise UserError(
            f"the cls_loss of {where} is a {type(cls_loss).__name__}, whose scores are nearly flat"
            " under the plain softmax that Detectron2 takes: it is for MMDetection's RoI heads"
        )
    if needs_sigmoid and not cls_loss.use_sigmoid:
        raise UserError(
            f"the cls_loss of {where} is a {type(cls_loss).__name__} of softmax form, but its"
            " scores are sigmoids: write use_sigmoid=True"
        )
    return cls_loss


def register(registry: Registry, cls: type[nn.Module]) -> None:
    """Put a class in a registry of Detectron2 that has its parent under the same name."""
    registry.register(type(f"Polyfocal{cls.__name__}", (cls,), {"__doc__": cls.__doc__}))
