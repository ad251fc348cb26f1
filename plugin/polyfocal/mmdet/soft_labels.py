"""Objects with several labels, or with soft labels, in the dense heads of MMDetection.

A head assigns one label to an anchor. So while the head computes its loss, it sees each combination
of classes in the training set as one more class. The loss gets the combination's row of targets
instead of that label. Nothing else in the head or the pipeline changes.
"""

from types import MethodType
from typing import Any

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, RetinaHead
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.losses import ClassificationLoss
from polyfocal.mmengine.hooks import LossHook
from polyfocal.mmengine.objects import leaves, unwrapped
from polyfocal.mmengine.registry import HOOKS

HEADS = (RetinaHead, FCOSHead, ATSSHead)
"""Heads whose targets are labels, and which assign anchors to objects without the labels."""


@HOOKS.register_module()
class SoftLabelsHook(LossHook):
    """Trains a dense head on the several classes of the objects of a :class:`CocoDataset`.

    It is for ``custom_hooks``; the data set of the training is one with ``soft_labels=True``.
    """

    def before_train(self, runner: Any) -> None:
        """Tell the head what the labels of the data set mean.

        Raises:
            UserError: The data set has no soft labels, or the model has no head that can take them.
        """
        found = [
            one for one in leaves(runner.train_dataloader.dataset) if hasattr(one, "class_scores")
        ]
        if len(found) != 1:
            raise UserError(
                f"SoftLabelsHook found {len(found)} training data sets of soft labels: expected "
                "one, type='polyfocal.CocoDataset', soft_labels=True."
            )
        head = getattr(unwrapped(runner.model), "bbox_head", None)
        use_soft_labels(head, torch.from_numpy(found[0].class_scores))


def use_soft_labels(head: Any, class_scores: Tensor) -> None:
    """Make a head's loss take labels beyond its classes as rows of targets.

    Args:
        head: One of ``HEADS`` with a sigmoid loss of this package that takes soft targets.
        class_scores: (R, C), in [0, 1]: what a label C + r means.

    Raises:
        UserError: The head or its loss is of another kind.
    """
    if type(head) not in HEADS:
        names = ", ".join(one.__name__ for one in HEADS)
        raise UserError(f"soft labels are for {names}, and this is {type(head).__name__}.")
    loss = head.loss_cls
    if not (isinstance(loss, ClassificationLoss) and loss.soft_targets and loss.use_sigmoid):
        raise UserError(
            f"soft labels need a sigmoid loss of polyfocal that takes soft targets in "
            f"{type(head).__name__}.loss_cls, such as type='polyfocal.Poly1FocalLoss', and this is "
            f"{type(loss).__name__}."
        )
    classes = head.num_classes
    if class_scores.shape[1] != classes:
        raise UserError(
            f"the soft labels are of {class_scores.shape[1]} classes, and the head of {classes}."
        )
    plain, background = torch.eye(classes), torch.zeros(1, classes)
    rows = torch.cat([plain, class_scores.float(), background])
    head.register_buffer("_target_rows", rows.to(next(head.parameters()).device), persistent=False)
    head.loss = MethodType(_loss, head)


def _loss(head: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The head's own loss, in which the last row of targets is the background's."""
    rows, classes = head._target_rows, head.num_classes

    def with_rows(loss: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        logits, labels, *more = given
        return logits, rows[labels], *more

    handle = head.loss_cls.register_forward_pre_hook(with_rows)
    head.num_classes = len(rows) - 1
    try:
        return type(head).loss(head, *args, **kwargs)
    finally:
        head.num_classes = classes
        handle.remove()
