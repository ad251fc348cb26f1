"""RetinaNet and FCOS with any sigmoid loss."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling import meta_arch as d2
from detectron2.structures import Boxes
from torch import Tensor

from polyfocal.detectron2.loss import build_loss, loss_settings, register, try_loss
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss


class RetinaNet(d2.RetinaNet):
    """Detectron2's RetinaNet with ``cls_loss`` instead of its focal loss.

    The loss is summed over all anchors except those labelled -1, and divided by Detectron2's moving
    average of the number of positive anchors. The ``reduction`` of the loss is not used. The loss
    has its own gamma and alpha: ``focal_loss_alpha`` and ``focal_loss_gamma`` stay at Detectron2's
    defaults. ``FocalLoss(use_sigmoid=True)`` equals Detectron2's own loss.

    Args:
        cls_loss: A sigmoid loss or its config, see :func:`polyfocal.detectron2.build_loss`. In
            yaml ``MODEL.RETINANET.CLS_LOSS``.
        kwargs: Arguments of Detectron2's class.

    Raises:
        UserError: ``cls_loss`` does not fit, or a setting would have no effect.
    """

    @configurable
    def __init__(self, *, cls_loss: ClassificationLoss | Mapping[str, Any], **kwargs: Any) -> None:
        loss = _dense_loss(cls_loss, "RetinaNet", kwargs)
        super().__init__(**kwargs)
        self.cls_loss = loss

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {**super().from_config(cfg), "cls_loss": loss_settings(cfg, "RETINANET")}

    def losses(
        self, anchors: list[Boxes], logits: list[Tensor], labels: list[Tensor], *of_boxes: Any
    ) -> dict[str, Tensor]:
        # The parent updates the normaliser and statistics, and computes the loss of the boxes. It
        # also computes its classification loss, from logits without a graph, which is dropped.
        losses = super().losses(anchors, _detached(logits), labels, *of_boxes)
        losses["loss_cls"] = _summed(self.cls_loss, logits, labels) / self.loss_normalizer
        return losses


class FCOS(d2.FCOS):
    """Detectron2's FCOS with ``cls_loss`` instead of its focal loss.

    As in :class:`RetinaNet`. Detectron2's FCOS is only for LazyConfig, and so is this class.

    Args:
        cls_loss: A sigmoid loss or its config, see :func:`polyfocal.detectron2.build_loss`.
        kwargs: Arguments of Detectron2's class.

    Raises:
        UserError: ``cls_loss`` does not fit, or a setting would have no effect.
    """

    def __init__(self, *, cls_loss: ClassificationLoss | Mapping[str, Any], **kwargs: Any) -> None:
        loss = _dense_loss(cls_loss, "FCOS", kwargs)
        super().__init__(**kwargs)
        self.cls_loss = loss

    def losses(
        self, anchors: list[Boxes], logits: list[Tensor], labels: list[Tensor], *of_boxes: Any
    ) -> dict[str, Tensor]:
        losses = super().losses(anchors, _detached(logits), labels, *of_boxes)
        losses["loss_fcos_cls"] = _summed(self.cls_loss, logits, labels) / self.loss_normalizer
        return losses


def _dense_loss(
    cls_loss: ClassificationLoss | Mapping[str, Any], where: str, settings: dict[str, Any]
) -> ClassificationLoss:
    """The loss, after a check of the settings of the parent's loss, which it replaces."""
    for name, default in {"focal_loss_alpha": 0.25, "focal_loss_gamma": 2.0}.items():
        if settings.get(name, default) != default:
            raise UserError(
                f"{where} has {name}={settings[name]}, which its cls_loss takes the place of:"
                f" write {name.removeprefix('focal_loss_')} in the cls_loss and leave {name} at"
                f" {default}"
            )
    loss = build_loss(cls_loss, where)
    try_loss(loss, where, torch.zeros(1, settings["num_classes"]), torch.zeros(1).long())
    return loss


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _summed(loss: ClassificationLoss, logits: list[Tensor], labels: list[Tensor]) -> Tensor:
    """The sum over logits (N, R_i, K) per level and labels (R,) per picture.

    The label -1 is ignored. K is background, as in the sigmoid form of this package.
    """
    return loss(
        torch.cat(logits, dim=1).flatten(0, 1),
        torch.cat(labels),
        reduction_override="sum",
        ignore_index=-1,
    )


register(META_ARCH_REGISTRY, RetinaNet)
