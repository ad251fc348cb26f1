"""MMDetection3D's anchor heads, for any classification loss, and an adapter for two other heads.

MMDetection3D 1.4 decides by the *name* of the loss whether the anchors of a frame are sampled. Only
'mmdet.FocalLoss' and 'mmdet.GHMC' train on all anchors and are divided by the positives. With any
other loss the head asks ``train_cfg`` for a sampler, which the configs of PointPillars and SECOND
do not have. With a sampler the loss is divided by all the anchors of a frame, hundreds of
thousands.
"""

from typing import Any

import torch
from mmdet3d.models import dense_heads
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.mmdet.heads import build_inner
from polyfocal.mmengine.registry import MODELS


@MODELS.register_module()
class Anchor3DHead(dense_heads.Anchor3DHead):
    """The head of PointPillars, SECOND and MVX-Net, in which a loss may have any name.

    Without a ``sampler`` in ``train_cfg``, as in every config of MMDetection3D with a focal loss,
    each anchor counts and all three losses of the head are divided by the number of positives. With
    a sampler, anchors are sampled and the losses are divided by their number. MMDetection 3.x
    decides in the same way. Arguments, and names in a checkpoint, are those of MMDetection3D's
    Anchor3DHead.
    """

    def _init_assigner_sampler(self) -> None:
        # The parent calls this method last. Before, it has set `sampling` by the name of the loss.
        self.sampling = bool(self.train_cfg) and self.train_cfg.get("sampler") is not None
        super()._init_assigner_sampler()


@MODELS.register_module()
class ShapeAwareHead(Anchor3DHead, dense_heads.ShapeAwareHead):
    """The head of SSN, in which a loss may have any name, see :class:`Anchor3DHead`."""


@MODELS.register_module()
class PartA2RPNHead(Anchor3DHead, dense_heads.PartA2RPNHead):
    """The proposal head of Part-A2 and PV-RCNN, see :class:`Anchor3DHead`."""


@MODELS.register_module()
class MinusOneBackground(nn.Module):
    """A sigmoid loss as ``cls_loss`` of ImVoxelHead and FCAF3DHead, whose background is -1.

    Args:
        loss: config of a sigmoid loss of this package.

    Example:
        >>> cls_loss = dict(
        ...     type='polyfocal.MinusOneBackground',
        ...     loss=dict(type='polyfocal.Poly1FocalLoss', epsilon=1.0, use_sigmoid=True))
    """

    def __init__(self, loss: dict[str, Any]) -> None:
        super().__init__()
        self.loss = build_inner("MinusOneBackground", loss)
        if not self.loss.use_sigmoid:
            raise UserError(
                f"MinusOneBackground holds a {type(self.loss).__name__} of softmax form: these"
                " heads take the sigmoid at test time, write use_sigmoid=True"
            )

    def forward(self, pred: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The inner loss of logits (N, C) and labels (N,) in [-1, C - 1]."""
        return self.loss(pred, torch.where(labels < 0, pred.shape[1], labels), *args, **kwargs)
