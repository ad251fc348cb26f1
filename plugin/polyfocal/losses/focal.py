"""Focal loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyfocal.losses import functional
from polyfocal.losses.base import ALPHA, GAMMA, ClassificationLoss, Range
from polyfocal.losses.functional import PerClass


class FocalLoss(ClassificationLoss):
    """Focal loss, :func:`polyfocal.losses.functional.focal_loss`.

    Args:
        gamma: >= 0.
        alpha: in [0, 1], one number or one a class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.

    Example:
        >>> loss_cls = FocalLoss(use_sigmoid=True)
        >>> loss_cls(torch.zeros(2, 3), torch.tensor([1, 3]), avg_factor=1)
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: PerClass | None = 0.25,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        functional.check_nonnegative("gamma", gamma)
        self.gamma = gamma

    def tunable(self) -> dict[str, Range]:
        return {"gamma": GAMMA, "alpha": ALPHA, **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.focal_loss(
            pred, target, weight, gamma=self.gamma, alpha=self.alpha, **common
        )
