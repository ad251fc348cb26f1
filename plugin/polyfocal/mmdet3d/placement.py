"""Refuses, while a 3D model is built, a loss in a head that would silently train something else.

See :mod:`polyfocal.mmdet.placement`, which checks the heads of MMDetection in the same way.
"""

from mmdet3d.models import dense_heads
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss, GaussianPoly1FocalLoss
from polyfocal.mmdet3d.heads import Anchor3DHead

# They give their loss the probabilities of a heatmap and a target of Gaussian bumps.
_HEATMAP_HEADS = (
    dense_heads.CenterHead,
    dense_heads.MonoFlexHead,
    dense_heads.SMOKEMono3DHead,
)
# Their background has the label -1.
_MINUS_ONE_HEADS = (dense_heads.FCAF3DHead, dense_heads.ImVoxelHead)
_LOGIT_HEADS = (dense_heads.Base3DDenseHead, dense_heads.BaseMono3DDenseHead)

_watching: RemovableHandle | None = None


def watch() -> None:
    """From now on, checks every loss of this package when a head takes it."""
    global _watching
    if _watching is None:
        _watching = register_module_module_registration_hook(check)


def check(head: nn.Module, name: str, loss: nn.Module | None) -> None:
    """Raises UserError where ``head.<name> = loss`` would build a wrong model.

    Args:
        head: the module that takes the loss.
        name: of the attribute.
        loss: what it is given; anything but a loss of this package is let through.
    """
    where, what = f"{type(head).__name__}.{name}", type(loss).__name__
    if isinstance(loss, GaussianPoly1FocalLoss):
        if isinstance(head, _LOGIT_HEADS) and not isinstance(head, _HEATMAP_HEADS):
            raise UserError(
                f"{where} is a {what}, which takes the probabilities of a heatmap, and the head"
                " gives logits: write type='polyfocal.Poly1FocalLoss'"
            )
        return
    if not isinstance(loss, ClassificationLoss):
        return
    if isinstance(head, _HEATMAP_HEADS):
        raise UserError(
            f"{where} is a {what}, which takes logits, and the head gives the probabilities of a"
            " heatmap: write type='polyfocal.GaussianPoly1FocalLoss', without use_sigmoid"
        )
    if isinstance(head, _MINUS_ONE_HEADS) and name == "cls_loss":
        raise UserError(
            f"{where} is a {what}, whose background is the label C, the number of classes:"
            f" {type(head).__name__} labels it -1; keep MMDetection's FocalLoss there"
        )
    if not isinstance(head, dense_heads.Anchor3DHead) or name != "loss_cls":
        return
    if isinstance(head, dense_heads.FreeAnchor3DHead):
        raise UserError(
            f"{where} is a {what}, but the loss of FreeAnchor3DHead is written into it and uses no"
            " loss_cls: use Anchor3DHead"
        )
    if not isinstance(head, Anchor3DHead):
        raise UserError(
            f"{where} is a {what}: MMDetection3D's {type(head).__name__} treats anchors by the name"
            f" of the loss, and would sample them; write type='polyfocal.{type(head).__name__}' for"
            " the head, which is the same for any loss"
        )
    if not loss.use_sigmoid:
        raise UserError(
            f"{where} is a softmax {what}: an anchor head of MMDetection3D numbers the background"
            " one beyond the outputs that a softmax has; write use_sigmoid=True"
        )
