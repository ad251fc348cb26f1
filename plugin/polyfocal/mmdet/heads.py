"""What MMDetection's heads need around a loss: adapters, and the class that they check for."""

from typing import Any

import torch
from mmdet.models.losses import QualityFocalLoss, accuracy
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from polyfocal import losses
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss
from polyfocal.mmengine.registry import MODELS


def build_inner(adapter: str, loss: dict[str, Any]) -> ClassificationLoss:
    """The inner loss of an adapter, which must be a loss of this package."""
    built = MMDET_MODELS.build(loss)
    if not isinstance(built, ClassificationLoss):
        raise UserError(
            f"{adapter} holds a {type(built).__name__}: expected a loss of polyfocal, for instance"
            " type='polyfocal.Poly1FocalLoss'"
        )
    return built


@MODELS.register_module()
@MMENGINE_MODELS.register_module()
class RoILoss(nn.Module):
    """A loss as ``loss_cls`` of a BBoxHead, such as Shared2FCBBoxHead or Cascade R-CNN's.

    A BBoxHead ignores ``use_sigmoid``: it makes C + 1 outputs and takes their softmax at test
    time. This adapter gives the head what two kinds of losses need, in training statistics, in the
    refinement of cascades and at test time:

    - a sigmoid loss: C outputs, one per class, and their sigmoid. A last column, 1 - max_k p_k,
      is the score of background;
    - a noised top-K loss or :class:`~polyfocal.losses.LDAMLoss`: C + 1 outputs and the loss's own
      activation, :meth:`polyfocal.losses.NoisedTopKLoss.activation` or
      :meth:`polyfocal.losses.LDAMLoss.activation`.

    Any other softmax loss needs no adapter there.

    Args:
        loss: config of a sigmoid loss, of a noised top-K loss or of LDAMLoss of this package.

    Example:
        >>> loss_cls = dict(
        ...     type='polyfocal.RoILoss',
        ...     loss=dict(type='polyfocal.FocalLoss', use_sigmoid=True))
    """

    custom_cls_channels = True
    custom_activation = True
    custom_accuracy = True

    def __init__(self, loss: dict[str, Any]) -> None:
        super().__init__()
        self.loss = build_inner("RoILoss", loss)
        if not self.loss.use_sigmoid and not hasattr(self.loss, "activation"):
            raise UserError(
                f"RoILoss holds a {type(self.loss).__name__} of softmax form: a BBoxHead takes it"
                " without an adapter"
            )

    def get_cls_channels(self, num_classes: int) -> int:
        """Outputs of the classifier: one per class; one more, for background, with a softmax."""
        return num_classes + (not self.loss.use_sigmoid)

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores (..., C + 1), the background last, of logits (..., C) or, softmax, (..., C + 1).

        A head gives (N, C), a tool that exports the model (B, N, C).
        """
        if not self.loss.use_sigmoid:
            return self.loss.activation(cls_score)
        scores = cls_score.sigmoid()
        if scores.shape[-1] == 0:
            return scores.new_ones(*scores.shape[:-1], 1)
        return torch.cat([scores, 1 - scores.amax(dim=-1, keepdim=True)], dim=-1)

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Top-1 accuracy in percent, background included, under the key 'acc'."""
        return {"acc": accuracy(self.get_activation(cls_score), labels)}

    def forward(self, cls_score: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The inner loss of the logits and labels (N,) in [0, C]."""
        return self.loss(cls_score, labels, *args, **kwargs)


@MODELS.register_module()
@MMENGINE_MODELS.register_module()
class MaskLoss(nn.Module):
    """A sigmoid loss as ``loss_mask`` of FCNMaskHead, pixel by pixel.

    FCNMaskHead gives its loss the class labels of the masks where other heads give weights. This
    adapter takes the mask of each object's own class, (N, H, W) of (N, C, H, W), and averages over
    the pixels.

    Args:
        loss: config of a sigmoid loss of this package. Poly1CrossEntropyLoss with epsilon=0 is
            the stock mask loss.

    Example:
        >>> loss_mask = dict(
        ...     type='polyfocal.MaskLoss',
        ...     loss=dict(type='polyfocal.Poly1CrossEntropyLoss', epsilon=1.0, use_sigmoid=True))
    """

    def __init__(self, loss: dict[str, Any]) -> None:
        super().__init__()
        self.loss = build_inner("MaskLoss", loss)
        if not self.loss.use_sigmoid:
            raise UserError(
                f"MaskLoss holds a {type(self.loss).__name__} of softmax form: masks of classes do"
                " not compete, write use_sigmoid=True"
            )

    def forward(self, mask_preds: Tensor, mask_targets: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (N, C, H, W), masks (N, H, W) in [0, 1] and labels (N,)."""
        rows = torch.arange(len(labels), device=labels.device)
        # (1,), as MMDetection's own mask loss returns it.
        return self.loss(mask_preds[rows, labels], mask_targets)[None]


class _QualityFocal(QualityFocalLoss):
    """MMDetection's class without its settings."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def _as_quality_focal(cls: type[ClassificationLoss]) -> type[ClassificationLoss]:
    """The class as a subclass of MMDetection's QualityFocalLoss, and registered instead of it.

    DETR-like heads hand (labels, scores) to an instance of that class, and labels to other losses.
    """
    described = {"__doc__": cls.__doc__, "__module__": __name__}
    made = type(cls.__name__, (cls, _QualityFocal), described)
    for registry in (MODELS, MMENGINE_MODELS):
        registry.register_module(module=made, force=True)
    return made


Poly1QualityFocalLoss = _as_quality_focal(losses.Poly1QualityFocalLoss)
Poly1VarifocalLoss = _as_quality_focal(losses.Poly1VarifocalLoss)
Poly1MatchabilityAwareLoss = _as_quality_focal(losses.Poly1MatchabilityAwareLoss)
Poly1IoUAwareBCELoss = _as_quality_focal(losses.Poly1IoUAwareBCELoss)
