"""Cyclical focal loss."""

from typing import Any

from torch import Tensor

from polyfocal.losses.base import ScheduledLoss
from polyfocal.losses.rows import poly_loss
from polyfocal.losses.schedule import FACTOR, cyclical_weight
from polyfocal.losses.settings import (
    ALPHA,
    GAMMA,
    SMOOTHING,
    Common,
    PerClass,
    Shared,
    Unpack,
    check_smoothing,
    loss_function,
)
from polyfocal.ops import PolyFocal

_BY_FORM: Any = ...  # a default that can be told from None, which is a value of alpha


@loss_function(
    gamma_hc=GAMMA, gamma_lc=GAMMA, factor=FACTOR, alpha=ALPHA, label_smoothing=SMOOTHING
)
def cyclical_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    progress: float,
    use_sigmoid: bool,
    gamma_hc: float = 3.0,
    gamma_lc: float = 2.0,
    factor: float = 4.0,
    alpha: PerClass | None = None,
    label_smoothing: float = 0.0,
    **common: Unpack[Common],
) -> Tensor:
    r"""Cyclical focal loss.

    .. math::
        L = -[\xi (1 + p_t)^{\gamma_{hc}} + (1 - \xi) (1 - p_t)^{\gamma_{lc}}] \log p_t

    with xi from :func:`polyfocal.losses.schedule.cyclical_weight`. This is the paper's softmax
    form. In the sigmoid form it holds for the entries with target 1. Entries with target 0 keep the
    focal loss, :math:`-(1 - p_t)^{\gamma_{lc}} \log p_t`, at every xi: the paper's cycle weighs
    only the log p_t of a sample's label, and a dense head has some 10^5 confident background
    entries per picture, which (1 + p_t)^gamma_hc would raise. A soft target y weighs xi by y.

    The gradient, in :mod:`polyfocal.ops.poly_focal` beside the formula, is written out in
    docs/losses/cyclical_focal.md.

    With label smoothing a (softmax form), the classes other than the label have the weight
    (1 - xi) p_k^gamma_lc + xi on their -(a / K) log p_k.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`.
        progress: part of the training that is done, clamped to [0, 1].
        use_sigmoid, alpha: as in :func:`~polyfocal.losses.focal.focal_loss`.
        gamma_hc: exponent of the high-confidence term, >= 0.
        gamma_lc: exponent of the low-confidence (focal) term, >= 0.
        factor: >= 1, see the schedule.
        label_smoothing: a in [0, 1); softmax form with integer labels.

    Source: Smith, Cyclical Focal Loss (2022); the sigmoid form is this project's.
    """
    poly = PolyFocal(gamma_lc, (), cyclical_weight(progress, factor), gamma_hc)
    return poly_loss(logits, target, weight, use_sigmoid, poly, alpha, label_smoothing, **common)


class CyclicalFocalLoss(ScheduledLoss):
    """Cyclical focal loss, :func:`polyfocal.losses.functional.cyclical_focal_loss`.

    How it learns what part of the training is done: :class:`~polyfocal.losses.base.ScheduledLoss`.

    Args:
        gamma_hc: exponent of the high-confidence term, >= 0.
        gamma_lc: exponent of the low-confidence (focal) term, >= 0.
        factor: >= 1; see :func:`polyfocal.losses.schedule.cyclical_weight`.
        alpha: in [0, 1], one number or one per class; None for no such weight. The default is 0.25
            in the sigmoid form, as in the focal loss of dense heads, and None in the softmax form,
            as in the paper.
        label_smoothing: in [0, 1), softmax form.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = cyclical_focal_loss

    def __init__(
        self,
        gamma_hc: float = 3.0,
        gamma_lc: float = 2.0,
        factor: float = 4.0,
        alpha: PerClass | None = _BY_FORM,
        use_sigmoid: bool | None = None,
        label_smoothing: float = 0.0,
        **shared: Unpack[Shared],
    ) -> None:
        if alpha is _BY_FORM:
            alpha = 0.25 if use_sigmoid else None
        super().__init__(
            use_sigmoid,
            gamma_hc=gamma_hc,
            gamma_lc=gamma_lc,
            factor=factor,
            alpha=alpha,
            label_smoothing=label_smoothing,
            **shared,
        )
        check_smoothing(self.label_smoothing, self.use_sigmoid)

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        return super().compute(pred, target, weight, progress=self.now(), **common)
