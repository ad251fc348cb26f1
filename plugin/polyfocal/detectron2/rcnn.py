"""The parts of Fast, Faster, Mask and Cascade R-CNN that classify, with any loss."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    proposal_generator,
    roi_heads,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from polyfocal.detectron2.loss import build_loss, loss_settings, register, try_loss
from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss


class FastRCNNOutputLayers(roi_heads.FastRCNNOutputLayers):
    """Detectron2's box classifier and regressor with ``cls_loss`` instead of cross-entropy.

    The loss decides on the activation. A softmax loss is the mean over the regions, as
    Detectron2's cross-entropy. A sigmoid loss covers the K classes without the logit of background.
    It is summed over the classes and averaged over the regions, as Detectron2's ``use_sigmoid_ce``;
    the scores at test time are then sigmoids. The ``reduction`` of the loss is not used. The
    weights keep their K + 1 outputs in both cases.

    Args:
        input_shape: Shape of the features.
        cls_loss: A loss or its config, see :func:`polyfocal.detectron2.build_loss`. In yaml
            ``MODEL.ROI_BOX_HEAD.CLS_LOSS``.
        prior_prob: Probability of each class at the start of a training with a sigmoid loss, in
            (0, 1): at 1/2 the many negatives would drown the few positives. None for 0.01.
        kwargs: Arguments of Detectron2's class. With ``use_fed_loss`` a sigmoid loss covers the
            classes of the batch and some more that are drawn, as in Detectron2.

    Raises:
        UserError: ``cls_loss`` or ``prior_prob`` does not fit, or a setting would have no effect.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        cls_loss: ClassificationLoss | Mapping[str, Any],
        prior_prob: float | None = None,
        **kwargs: Any,
    ) -> None:
        where = "FastRCNNOutputLayers"
        cls_loss = build_loss(cls_loss, where, needs_sigmoid=False)
        name = type(cls_loss).__name__
        if not cls_loss.use_sigmoid:
            given = {"prior_prob": prior_prob is not None}
            given |= {key: kwargs.get(key, False) for key in ("use_sigmoid_ce", "use_fed_loss")}
            for key in (key for key, asked in given.items() if asked):
                raise UserError(
                    f"{key} is for a sigmoid loss, but the cls_loss of {where} is a {name} of"
                    f" softmax form: write use_sigmoid=True in it or leave {key} out"
                )
        elif prior_prob is None:
            prior_prob = 0.01
        elif not 0 < prior_prob < 1:
            raise UserError(f"prior_prob={prior_prob}: expected a number between 0 and 1")
        columns = kwargs["num_classes"] + (not cls_loss.use_sigmoid)
        try_loss(cls_loss, where, torch.zeros(1, columns), torch.zeros(1, dtype=torch.int64))
        # The parent's switch of the activation at test time.
        kwargs["use_sigmoid_ce"] = cls_loss.use_sigmoid
        super().__init__(input_shape, **kwargs)
        self.cls_loss = cls_loss
        if prior_prob is not None:
            nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec) -> dict[str, Any]:
        settings = super().from_config(cfg, input_shape)
        settings["cls_loss"] = loss_settings(cfg, "ROI_BOX_HEAD")
        settings["prior_prob"] = cfg.MODEL.ROI_BOX_HEAD.PRIOR_PROB
        return settings

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        logits, deltas = predictions
        if not proposals:  # the parent takes an empty list only in class-agnostic form
            return {"loss_cls": logits.sum() * 0, "loss_box_reg": deltas.sum() * 0}
        parents_logits = logits.detach()
        if self.cls_loss.use_sigmoid:
            # The logit of background is not trained. At 0 it is the largest if no class is above
            # 1/2, so that the parent's accuracies mean something.
            parents_logits = parents_logits.clone()
            parents_logits[:, -1] = 0
            logits = logits[:, :-1]
        # The parent's statistics and loss of the boxes; its classification loss is dropped.
        losses = super().losses((parents_logits, deltas), proposals)
        labels = torch.cat([p.gt_classes for p in proposals])
        weight = self._federated_weight(labels) if self.use_fed_loss else None
        loss = self.cls_loss(logits, labels, weight, reduction_override="sum")
        losses["loss_cls"] = self.loss_weight.get("loss_cls", 1.0) * loss / max(len(logits), 1)
        return losses

    def sigmoid_cross_entropy_loss(self, pred_class_logits: Tensor, gt_classes: Tensor) -> Tensor:
        # The parent's loss is dropped. Its federated loss would draw classes, as ours does.
        return pred_class_logits.sum() * 0

    def _federated_weight(self, labels: Tensor) -> Tensor:
        """1 for the classes of the batch and those that the parent draws, else 0, (N, K)."""
        weight = torch.zeros(self.num_classes + 1, device=labels.device)
        if len(labels):
            count, frequencies = self.fed_loss_num_classes, self.fed_loss_cls_weights
            drawn = self.get_fed_loss_classes(labels, count, self.num_classes, frequencies)
            weight[drawn] = 1
        return weight[:-1].expand(len(labels), -1)


def _without_fed_loss(cfg: Any) -> Any:
    """The config for a stock predictor that is replaced: it wants its own sigmoid loss for that."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = False
    return cfg


class StandardROIHeads(roi_heads.StandardROIHeads):
    """Detectron2's class with :class:`FastRCNNOutputLayers`, for yaml.

    In a LazyConfig ``model.roi_heads.box_predictor._target_`` says it.
    """

    # As Detectron2 annotates its own class for TorchScript.
    mask_on: torch.jit.Final[bool]  # type: ignore[misc]
    keypoint_on: torch.jit.Final[bool]  # type: ignore[misc]

    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(_without_fed_loss(cfg), input_shape)
        parts["box_predictor"] = FastRCNNOutputLayers(cfg, parts["box_head"].output_shape)
        return parts


class CascadeROIHeads(roi_heads.CascadeROIHeads):
    """Detectron2's class with :class:`FastRCNNOutputLayers` in every stage, for yaml.

    In a LazyConfig ``_target_`` of ``model.roi_heads.box_predictors`` says it.
    """

    @classmethod
    def _init_box_head(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super()._init_box_head(_without_fed_loss(cfg), input_shape)
        parts["box_predictors"] = [
            FastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=predictor.box2box_transform
            )
            for head, predictor in zip(parts["box_heads"], parts["box_predictors"], strict=True)
        ]
        return parts


class Res5ROIHeads(roi_heads.Res5ROIHeads):
    """Detectron2's class of its C4 models with :class:`FastRCNNOutputLayers`, for yaml.

    In a LazyConfig ``model.roi_heads.box_predictor._target_`` says it.
    """

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        parts = super().from_config(_without_fed_loss(cfg), input_shape)
        channels = parts["box_predictor"].cls_score.in_features
        parts["box_predictor"] = FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels))
        return parts


class MaskRCNNConvUpsampleHead(roi_heads.MaskRCNNConvUpsampleHead):
    """Detectron2's mask head with ``cls_loss`` instead of binary cross-entropy.

    The loss is averaged over the pixels of the masks of the regions' own classes. The ``reduction``
    of the loss is not used. ``Poly1CrossEntropyLoss(epsilon=0, use_sigmoid=True)`` equals
    Detectron2's own loss.

    Args:
        input_shape: Shape of the features.
        cls_loss: A sigmoid loss or its config, see :func:`polyfocal.detectron2.build_loss`. In
            yaml ``MODEL.ROI_MASK_HEAD.CLS_LOSS``.
        kwargs: Arguments of Detectron2's class.

    Raises:
        UserError: ``cls_loss`` does not fit.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        cls_loss: ClassificationLoss | Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        where = "MaskRCNNConvUpsampleHead"
        loss = build_loss(cls_loss, where)
        try_loss(loss, where, torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
        super().__init__(input_shape, **kwargs)
        # Not a child module: the parent is an nn.Sequential, which would call it as a layer.
        self.predictor.cls_loss = loss

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec) -> dict[str, Any]:
        settings = super().from_config(cfg, input_shape)
        settings["cls_loss"] = loss_settings(cfg, "ROI_MASK_HEAD")
        return settings

    # Without a return type, which TorchScript infers.
    def forward(self, x: Tensor, instances: list[Instances]):  # type: ignore[no-untyped-def]
        x = self.layers(x)
        if self.training:
            return self._losses(x, instances)
        roi_heads.mask_head.mask_rcnn_inference(x, instances)
        return instances

    @torch.jit.unused
    def _losses(self, logits: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        found = [i for i in instances if len(i)]
        if not found:
            return {"loss_mask": logits.sum() * 0}
        side = logits.shape[-1]
        masks = torch.cat(
            [i.gt_masks.crop_and_resize(i.proposal_boxes.tensor, side) for i in found]
        ).to(logits.device)
        classes = torch.cat([i.gt_classes for i in found])
        if logits.shape[1] == 1:  # one mask for all classes
            classes = torch.zeros_like(classes)
        logits = logits[torch.arange(len(logits), device=logits.device), classes]
        self._write_statistics(logits.detach(), masks)
        loss = self.predictor.cls_loss(logits, masks.float(), reduction_override="mean")
        return {"loss_mask": loss * self.loss_weight}

    @torch.jit.unused
    def _write_statistics(self, logits: Tensor, masks: Tensor) -> None:
        """What Detectron2 logs about masks: shares of pixels, and sometimes pictures."""
        inside = masks > 0.5
        wrong = (logits > 0) != inside
        storage = get_event_storage()
        for name, share in {
            "accuracy": (~wrong).float().mean(),
            "false_positive": (wrong & ~inside).sum() / (~inside).sum().clamp_min(1),
            "false_negative": (wrong & inside).sum() / inside.sum().clamp_min(1),
        }.items():
            storage.put_scalar(f"mask_rcnn/{name}", share.item())
        if self.vis_period > 0 and storage.iter % self.vis_period == 0:
            pairs = torch.cat([logits.sigmoid(), masks.float()], dim=2)
            for index, pair in enumerate(pairs):
                storage.put_image(
                    f"Left: mask prediction;   Right: mask GT ({index})", pair.expand(3, -1, -1)
                )


class RPN(proposal_generator.RPN):
    """Detectron2's RPN with ``cls_loss`` instead of binary cross-entropy.

    The loss is summed over the sampled anchors and divided by the number of anchors to sample, as
    in Detectron2. The ``reduction`` of the loss is not used. There is one class, the object.
    ``Poly1CrossEntropyLoss(epsilon=0, use_sigmoid=True)`` equals Detectron2's own loss.

    Args:
        cls_loss: A sigmoid loss or its config, see :func:`polyfocal.detectron2.build_loss`. In
            yaml ``MODEL.RPN.CLS_LOSS``.
        kwargs: Arguments of Detectron2's class.

    Raises:
        UserError: ``cls_loss`` does not fit.
    """

    @configurable
    def __init__(self, *, cls_loss: ClassificationLoss | Mapping[str, Any], **kwargs: Any) -> None:
        loss = build_loss(cls_loss, "RPN")
        try_loss(loss, "RPN", torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
        super().__init__(**kwargs)
        self.cls_loss = loss

    @classmethod
    def from_config(cls, cfg: Any, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), "cls_loss": loss_settings(cfg, "RPN")}

    def losses(
        self, anchors: list[Boxes], levels: list[Tensor], gt_labels: list[Tensor], *of_boxes: Any
    ) -> dict[str, Tensor]:
        # The parent's statistics and loss of the boxes; its classification loss is dropped.
        detached = [logits.detach() for logits in levels]
        losses = super().losses(anchors, detached, gt_labels, *of_boxes)
        labels = torch.stack(gt_labels)
        sampled = labels >= 0
        logits = torch.cat(levels, dim=1)[sampled]
        # In Detectron2 the object is 1. As the only class of a loss it is 0, and background is 1.
        loss = self.cls_loss(logits[:, None], 1 - labels[sampled].long(), reduction_override="sum")
        losses["loss_rpn_cls"] = (
            self.loss_weight.get("loss_rpn_cls", 1.0)
            * loss
            / (self.batch_size_per_image * len(gt_labels))
        )
        return losses


register(ROI_HEADS_REGISTRY, StandardROIHeads)
register(ROI_HEADS_REGISTRY, CascadeROIHeads)
register(ROI_HEADS_REGISTRY, Res5ROIHeads)
register(ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead)
register(PROPOSAL_GENERATOR_REGISTRY, RPN)
