"""Cyclical focal loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyfocal.losses import functional
from polyfocal.losses.base import ALPHA, GAMMA, Range, ScheduledLoss
from polyfocal.losses.functional import PerClass
from polyfocal.losses.schedule import check_factor


class CyclicalFocalLoss(ScheduledLoss):
    """Cyclical focal loss, :func:`polyfocal.losses.functional.cyclical_focal_loss`.

    How it learns what part of the training is done: :class:`~polyfocal.losses.base.ScheduledLoss`.

    Args:
        gamma_hc: exponent of the high-confidence term, >= 0.
        gamma_lc: exponent of the low-confidence (focal) term, >= 0.
        factor: >= 1; see :func:`polyfocal.losses.schedule.cyclical_weight`.
        alpha: in [0, 1], one number or one a class. The default is 0.25 in the sigmoid form, as
            in the focal loss of dense heads, and none in the softmax form, as in the paper.
        label_smoothing: in [0, 1), softmax form.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        gamma_hc: float = 3.0,
        gamma_lc: float = 2.0,
        factor: float = 4.0,
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        if alpha is None and use_sigmoid:
            alpha = 0.25
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        functional.check_nonnegative("gamma_hc", gamma_hc)
        functional.check_nonnegative("gamma_lc", gamma_lc)
        functional.check_label_smoothing(label_smoothing, bool(use_sigmoid))
        check_factor(factor)
        self.gamma_hc = gamma_hc
        self.gamma_lc = gamma_lc
        self.factor = factor
        self.label_smoothing = label_smoothing

    def tunable(self) -> dict[str, Range]:
        return {
            "gamma_hc": GAMMA,
            "gamma_lc": GAMMA,
            "factor": Range(1.0, 8.0, log=True),  # the author's are 2 and 4
            "alpha": ALPHA,
            **super().tunable(),
        }

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.cyclical_focal_loss(
            pred,
            target,
            weight,
            progress=self.progress(),
            gamma_hc=self.gamma_hc,
            gamma_lc=self.gamma_lc,
            factor=self.factor,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            **common,
        )
