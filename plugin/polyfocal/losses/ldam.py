"""LDAM, the usual baseline for long tails."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.imbalanced_noised_topk import of_columns, rescaled, topk_margins
from polyfocal.losses.poly1_cross_entropy import poly1_cross_entropy
from polyfocal.losses.rows import positives
from polyfocal.losses.settings import (
    Form,
    Number,
    Numbers,
    PerClass,
    Range,
    Shared,
    Unpack,
)


class LDAMLoss(ClassificationLoss):
    r"""Cross-entropy after a margin was taken from the label's score, larger for rarer classes.

    .. math::
        L = -\log \frac{e^{S (s_y - m_y)}}{e^{S (s_y - m_y)} + \sum_{j \ne y} e^{S s_j}}, \qquad
        m_y = C / n_y^{1/4}, \; \max_y m_y = M

    Args:
        class_counts: n, training samples of each class; for logits with a background column, those
            of the other classes, and background gets the smallest margin. From a config it may also
            be the path of a COCO annotation file.
        max_margin: M > 0; the authors use 0.5.
        scale: S > 0. 30, the authors' value, is for scores that are cosines; for others write 1.
        use_sigmoid: False.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss
        (2019), equations 12 and 13.
    """

    settings: ClassVar[dict[str, Any]] = {
        "max_margin": Number(Range(0.1, 0.8), without="low"),  # the authors': 0.5
        "scale": Number(Range(1.0, 100.0, log=True), without="low"),
        "margins": Numbers(),
        "use_sigmoid": Form(only=False, what="LDAM loss"),
    }
    soft_targets = False
    margins: Tensor
    max_margin: float
    scale: float

    def __init__(
        self,
        class_counts: PerClass,
        max_margin: float = 0.5,
        scale: float = 30.0,
        use_sigmoid: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, max_margin=max_margin, scale=scale, **shared)
        self.margins = topk_margins(class_counts, self.max_margin)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "max_margin" and "margins" in self._buffers:
            self.margins = rescaled(self.margins, self.max_margin)

    def activation(self, pred: Tensor) -> Tensor:
        """Scores (..., C): the softmax that the loss trains, without margins."""
        return torch.softmax(self.scale * pred.float(), dim=-1)

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        if pred.dim() != 2 or target.dim() != 1:
            raise UserError(
                f"LDAMLoss has logits {tuple(pred.shape)} and a target {tuple(target.shape)}:"
                " expected logits (N, C) and labels (N,)"
            )
        # Not in half precision: the scale would take the logits beyond its range.
        pred = pred if pred.dtype == torch.float64 else pred.float()
        margins = of_columns(self.margins.to(pred.device, pred.dtype), pred.shape[1])
        margins = margins * positives(target, pred.shape[1])
        return poly1_cross_entropy.unchecked(  # type: ignore[attr-defined]
            self.scale * (pred - margins), target, weight, epsilon=0.0, **common
        )
