"""Refuses, while a model is built, a loss in a head that would silently train something else.

A head assigns its loss to an attribute, and torch tells about that: a module registration hook
sees the head and the loss together at the only moment when both are known and nothing has run.
"""

from typing import NoReturn

from mmdet.models.dense_heads import (
    CenterNetHead,
    CenterNetUpdateHead,
    CornerHead,
    GFLHead,
    RTMDetHead,
    TOODHead,
    VFNetHead,
    YOLOV3Head,
)
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, DIIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss, GaussianPoly1FocalLoss, NoisedTopKLoss
from polyfocal.mmdet.heads import MaskLoss, RoILoss

# They hand (labels, quality scores) to their loss, made for Quality Focal Loss.
_QUALITY_HEADS = (GFLHead, RTMDetHead, TOODHead)
# Those of MMDetection's projects are not in its package.
_QUALITY_HEADS_OF_PROJECTS = ("CoDINOHead",)
# They give the probabilities of a heatmap and a target of Gaussian bumps.
_HEATMAP_HEADS = (CenterNetHead, CornerHead)

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
    if not isinstance(loss, ClassificationLoss | GaussianPoly1FocalLoss | RoILoss | MaskLoss):
        return
    where, what = f"{type(head).__name__}.{name}", type(loss).__name__
    if isinstance(head, CenterNetUpdateHead) and name == "loss_cls":
        _refuse(head, where, what, "heatmaps together with the indices of the positives")
    if isinstance(loss, GaussianPoly1FocalLoss):
        if isinstance(head, BaseDenseHead | BBoxHead) and not isinstance(head, _HEATMAP_HEADS):
            raise UserError(
                f"{where} is a {what}, which is for the heatmaps of CenterNetHead and CornerHead:"
                " write type='polyfocal.Poly1FocalLoss'"
            )
        return
    if isinstance(head, RoILoss | MaskLoss):
        return
    if isinstance(head, _HEATMAP_HEADS) and "heatmap" in name:
        raise UserError(
            f"{where} is a {what}, which takes logits, and the head gives the probabilities of a"
            " heatmap: write type='polyfocal.GaussianPoly1FocalLoss', without use_sigmoid"
        )
    if isinstance(head, FCNMaskHead):
        if not isinstance(loss, MaskLoss):
            raise UserError(
                f"{where} is a {what}: a mask head passes labels where other heads pass weights;"
                f" write dict(type='polyfocal.MaskLoss', loss=dict(type='polyfocal.{what}',"
                " use_sigmoid=True, ...))"
            )
        return
    if isinstance(loss, MaskLoss):
        raise UserError(f"{where} is a MaskLoss: expected one in loss_mask of an FCNMaskHead only")
    if isinstance(head, BBoxHead):
        _check_bbox_head(head, where, loss)
        return
    if isinstance(loss, NoisedTopKLoss) and hasattr(head, "cls_out_channels"):
        raise UserError(
            f"{where} is a {what}: {type(head).__name__} takes the plain softmax at test time,"
            " under which this loss's scores are nearly flat; it is for BBoxHeads, inside RoILoss"
        )
    if isinstance(loss, RoILoss):
        raise UserError(
            f"{where} is a RoILoss, which is for BBoxHeads: give {type(head).__name__} the inner"
            f" loss, {type(loss.loss).__name__}, itself"
        )
    if name == "loss_cls" and (
        isinstance(head, _QUALITY_HEADS)
        or any(cls.__name__ in _QUALITY_HEADS_OF_PROJECTS for cls in type(head).__mro__)
    ):
        _refuse(head, where, what, "pairs of labels and quality scores")
    if isinstance(head, VFNetHead) and name == "loss_cls" and head.use_vfl:
        _refuse(head, where, what, "overlaps of the predicted boxes as targets, for Varifocal Loss")
    if isinstance(head, TOODHead) and name == "initial_loss_cls":
        _refuse(head, where, what, "probabilities, for FocalLoss with activated=True")
    if isinstance(head, YOLOV3Head) and not loss.use_sigmoid:
        raise UserError(f"{where} is a softmax {what}: it takes a sigmoid loss, use_sigmoid=True")
    expects_sigmoid = getattr(head, "use_sigmoid_cls", None)
    if name == "loss_cls" and expects_sigmoid is not None and expects_sigmoid != loss.use_sigmoid:
        raise UserError(
            f"{where} is a {what} with use_sigmoid={loss.use_sigmoid}, but the head was made for"
            f" use_sigmoid={expects_sigmoid}: write use_sigmoid={expects_sigmoid} in the loss's"
            " config, where the head reads it"
        )


def _refuse(head: nn.Module, where: str, what: str, gives: str) -> NoReturn:
    raise UserError(
        f"{where} is a {what}, which takes logits and labels: {type(head).__name__} gives its loss"
        f" {gives}; keep the head's own loss, or use ATSSHead or RetinaHead"
    )


def _check_bbox_head(head: BBoxHead, where: str, loss: ClassificationLoss | RoILoss) -> None:
    # DIIHead (Sparse R-CNN) is the one BBoxHead that asks its loss for use_sigmoid.
    takes_sigmoid = isinstance(head, DIIHead)
    if isinstance(loss, RoILoss):
        if takes_sigmoid:
            raise UserError(
                f"{where} is a RoILoss: {type(head).__name__} takes a sigmoid loss without an"
                f" adapter, give it {type(loss.loss).__name__} itself"
            )
        return
    what = type(loss).__name__
    if isinstance(loss, NoisedTopKLoss):
        raise UserError(
            f"{where} is a {what}, whose scores are nearly flat under a BBoxHead's softmax: write"
            f" dict(type='polyfocal.RoILoss', loss=dict(type='polyfocal.{what}', ...))"
        )
    if loss.use_sigmoid and not takes_sigmoid:
        raise UserError(
            f"{where} is a sigmoid {what}, but a BBoxHead takes the softmax of C + 1 outputs at"
            f" test time: write dict(type='polyfocal.RoILoss', loss=dict(type='polyfocal.{what}',"
            " use_sigmoid=True, ...)), or use_sigmoid=False"
        )
