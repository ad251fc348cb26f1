"""LDAM, the usual baseline for long tails."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import ClassificationLoss, Range


class LDAMLoss(ClassificationLoss):
    r"""Cross-entropy after the label's score has lost a margin, larger for rarer classes.

    .. math::
        L = -\log \frac{e^{S (s_y - m_y)}}{e^{S (s_y - m_y)} + \sum_{j \ne y} e^{S s_j}}, \qquad
        m_y = C / n_y^{1/4}, \; \max_y m_y = M

    Args:
        class_counts: n, training samples of each class, one a column of the logits; from a config
            it may also be the path of a COCO annotation file.
        max_margin: M > 0; the authors' is 0.5.
        scale: S > 0. 30, the authors', is for scores that are cosines; with others write 1.
        use_sigmoid: False.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss
        (2019), equations 12 and 13.
    """

    margins: Tensor

    def __init__(
        self,
        class_counts: Sequence[float] | Tensor,
        max_margin: float = 0.5,
        scale: float = 30.0,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, None, class_weight, ignore_index)
        functional.check_form("LDAM loss", use_sigmoid, False)
        functional.check_topk(1, 0.0, 1, scale)
        margins = functional.topk_margins(class_counts, max_margin)
        self.register_buffer("margins", margins, persistent=False)
        self.max_margin = max_margin
        self.scale = scale

    def activation(self, pred: Tensor) -> Tensor:
        """Scores (N, C): the softmax that the loss trains, without margins."""
        return torch.softmax(self.scale * pred.float(), dim=1)

    def tunable(self) -> dict[str, Range]:
        return {
            "max_margin": Range(0.1, 0.8),  # the authors': 0.5
            "scale": Range(1.0, 100.0, log=True),
            **super().tunable(),
        }

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        if pred.dim() != 2 or pred.shape[1] != len(self.margins) or target.dim() != 1:
            raise UserError(
                f"LDAMLoss has {len(self.margins)} class counts for logits {tuple(pred.shape)} and"
                f" a target {tuple(target.shape)}: expected a column a count and labels (N,)"
            )
        # Not in a half's precision: the scale would take its logits beyond its range.
        pred = pred if pred.dtype == torch.float64 else pred.float()
        columns = torch.arange(pred.shape[1], device=pred.device)
        margins = self.margins.to(pred.device, pred.dtype) * (target.unsqueeze(1) == columns)
        return functional.poly1_cross_entropy(
            self.scale * (pred - margins), target, weight, epsilon=0.0, **common
        )
