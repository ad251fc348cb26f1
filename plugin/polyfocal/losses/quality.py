r"""Losses that teach a class score to be the quality of the box: IoU-aware losses.

Notation: p = sigmoid(x); y in [0, 1] the quality of a positive entry, as a rule the IoU of its box,
and 0 of a negative one. The target is one of

``(labels, scores)``
    labels ``(N,)`` in [0, C], C being background, and the qualities ``(N,)`` of the rows; those of
    background rows are not read. Labels stay labels: no ``(N, C)`` target is made.
``labels``
    ``(N,)`` integers: every positive has the quality 1.
``scores``
    ``(N, C)`` in [0, 1]: an entry above 0 is a positive.

A score is clamped where rounding explains that it leaves [0, 1]; one that is further out, or NaN,
is refused on the CPU. Nothing of the target has a gradient.

Every loss is its original at epsilon = 0. For any epsilon >= -1 it is non-negative, least at p = y
and grows on either side; for y in {0, 1} it is a Poly-1 focal loss. docs/losses/quality.md derives
the terms.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyfocal._torch import autocast_off, can_read
from polyfocal.errors import UserError
from polyfocal.losses.base import EPSILON, LOSS_WEIGHT, ClassificationLoss, Range
from polyfocal.losses.functional import (
    _bounds,
    _per_class,
    check_class_weight,
    check_epsilons,
    check_form,
    check_nonnegative,
)
from polyfocal.losses.reduction import check_reduction, expand_weight, mean_scale
from polyfocal.ops.poly_focal import PolyFocal
from polyfocal.ops.quality import Quality, quality_loss

__all__ = [
    "poly1_focal_of_probabilities",
    "poly1_iou_aware_bce",
    "poly1_matchability_aware_loss",
    "poly1_quality_focal_loss",
    "poly1_varifocal_loss",
]

Target = Tensor | tuple[Tensor, Tensor] | list[Tensor]

_ROUNDING = 1e-3  # an IoU in half precision
_LEAST_BETA = 0.2  # of a negative epsilon


def poly1_quality_focal_loss(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    beta: float = 2.0,
    use_sigmoid: bool = True,
    activated: bool = False,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 quality focal loss.

    .. math:: L = |y - p|^\beta\, [-y \log p - (1 - y) \log(1 - p)] + \epsilon\, |y - p|^{\beta + 1}

    Args:
        logits: (N, C), floating point; probabilities in [0, 1] with ``activated``.
        target: see the module.
        weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.reduction`. Without an ``avg_factor`` a mean is over the N C
            entries, as everywhere in this package, where MMDetection's is over the N rows.
        epsilon: >= -1; 0 is the quality focal loss. Below 0 it takes beta >= 0.2, without which
            the loss would not be least at p = y.
        beta: >= 0.
        use_sigmoid: True, the only form.
        activated: ``logits`` are probabilities. At 0 and 1 exactly the logarithm is -100.

    Returns:
        A scalar, or for ``reduction='none'`` (N, C).

    Raises:
        UserError: a shape, dtype or range that is none of these.

    Source: Li et al., Generalized Focal Loss (2020), equation 2; the term of epsilon follows
    Leng et al., PolyLoss (2022).
    """
    check_nonnegative("beta", beta)
    check_beta(beta, epsilon)
    quality = Quality(PolyFocal(beta, (epsilon,)), epsilon=epsilon, beta=beta)
    return _loss(
        logits, target, weight, quality, use_sigmoid, activated, class_weight, ignore_index,
        reduction, avg_factor,
    )  # fmt: skip


def poly1_varifocal_loss(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou_weighted: bool = True,
    use_sigmoid: bool = True,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 varifocal loss.

    .. math::
        L = \begin{cases}
            y\, [-y \log p - (1 - y) \log(1 - p) + \epsilon\, m(p, y)] & y > 0 \\
            \alpha\, [-p^\gamma \log(1 - p) + \epsilon\, p^{\gamma + 1}] & y = 0
        \end{cases}

    with m the first term in the expansion of the positives' loss around p = y,

    .. math::
        m(p, y) = p - y - y \log(p / y) \;\text{for}\; p \ge y, \qquad m(1 - p, 1 - y) \;\text{else}

    which is 1 - p for y = 1.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :func:`poly1_quality_focal_loss`. A positive with quality 0 counts as a negative.
        epsilon: >= -1; 0 is the varifocal loss.
        alpha: >= 0, weighs the negatives.
        gamma: >= 0, power of the negatives' modulator.
        iou_weighted: y weighs the positives; else 1 does.
        use_sigmoid: True, the only form.

    Returns, raises: as :func:`poly1_quality_focal_loss`.

    Source: Zhang et al., VarifocalNet (2021), equation 2; Leng et al., PolyLoss (2022).
    """
    check_nonnegative("alpha", alpha)
    check_nonnegative("gamma", gamma)
    check_epsilons([epsilon])
    quality = Quality(
        PolyFocal(gamma, (epsilon,)), negative=alpha, epsilon=epsilon, by_score=iou_weighted
    )
    return _loss(
        logits, target, weight, quality, use_sigmoid, False, class_weight, ignore_index,
        reduction, avg_factor, zero_is_negative=True,
    )  # fmt: skip


def poly1_matchability_aware_loss(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    gamma: float = 1.5,
    alpha: float | None = None,
    use_sigmoid: bool = True,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 matchability-aware loss (MAL).

    .. math::
        L = \begin{cases}
            -t \log p - (1 - t) \log(1 - p) + \epsilon\, m(p, t), \;
                t = y^\gamma & \text{positive} \\
            \alpha \bar p^\gamma\, [-\log(1 - p) + \epsilon\, p] & \text{negative}
        \end{cases}

    with m as in :func:`poly1_varifocal_loss` and :math:`\bar p` the value of p without a gradient,
    as in the published code: the gradient is not that of the value.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :func:`poly1_quality_focal_loss`. In the form (labels, scores) a positive with quality 0
            stays a positive, which learns 0 with the weight 1.
        epsilon: >= -1; 0 is the matchability-aware loss.
        gamma: >= 0, of the targets and of the negatives' modulator.
        alpha: >= 0, weighs the negatives; None for 1.
        use_sigmoid: True, the only form.

    Returns, raises: as :func:`poly1_quality_focal_loss`.

    Source: Huang et al., DEIM (2025), equation 4; Leng et al., PolyLoss (2022).
    """
    check_nonnegative("gamma", gamma)
    if alpha is not None:
        check_nonnegative("alpha", alpha)
    check_epsilons([epsilon])
    quality = Quality(
        PolyFocal(gamma, (epsilon,)),
        negative=1.0 if alpha is None else alpha,
        epsilon=epsilon,
        power=gamma,
        detached=True,
    )
    return _loss(
        logits, target, weight, quality, use_sigmoid, False, class_weight, ignore_index,
        reduction, avg_factor,
    )  # fmt: skip


def poly1_iou_aware_bce(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    use_sigmoid: bool = True,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 IoU-aware binary cross-entropy.

    .. math::
        L = \begin{cases}
            -t \log p - (1 - t) \log(1 - p) + \epsilon\, m(p, t), \;
                t = \max(\bar p^\alpha y^{1 - \alpha}, 0.01) & \text{positive} \\
            -p^\gamma \log(1 - p) + \epsilon\, p^{\gamma + 1} & \text{negative}
        \end{cases}

    with m as in :func:`poly1_varifocal_loss` and :math:`\bar p` the value of p without a gradient.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :func:`poly1_quality_focal_loss`. In the form (labels, scores) a positive with quality 0
            stays a positive, which learns 0.01.
        epsilon: >= -1; 0 is the IoU-aware binary cross-entropy.
        alpha: in [0, 1], the prediction's part of the target.
        gamma: >= 0, power of the negatives' modulator.
        use_sigmoid: True, the only form.

    Returns, raises: as :func:`poly1_quality_focal_loss`.

    Source: Cai et al., Align-DETR (2023), equations 3 and 4, and the lower limit of RF-DETR's
    code; Leng et al., PolyLoss (2022).
    """
    check_mix(alpha)
    check_nonnegative("gamma", gamma)
    check_epsilons([epsilon])
    quality = Quality(PolyFocal(gamma, (epsilon,)), epsilon=epsilon, mix=alpha, floor=0.01)
    return _loss(
        logits, target, weight, quality, use_sigmoid, False, class_weight, ignore_index,
        reduction, avg_factor,
    )  # fmt: skip


def poly1_focal_of_probabilities(
    probabilities: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    use_sigmoid: bool = True,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 focal loss of probabilities, where a head has no logits.

    .. math:: L = \alpha_t [-(1 - p_t)^\gamma \log p_t + \epsilon (1 - p_t)^{\gamma + 1}]

    Args:
        probabilities: (N, C) in [0, 1]. At 0 and 1 exactly the logarithm is -100.
        target: labels (N,) in [0, C], C being background.
        weight, class_weight, ignore_index, reduction, avg_factor, epsilon: see
            :func:`poly1_quality_focal_loss`.
        gamma: >= 0.
        alpha: in [0, 1], or None for no such weight; one number.
        use_sigmoid: True, the only form.

    Returns, raises: as :func:`poly1_quality_focal_loss`.

    Source: :func:`polyfocal.losses.functional.poly1_focal_loss`.
    """
    check_nonnegative("gamma", gamma)
    check_epsilons([epsilon])
    if alpha is not None:
        check_mix(alpha)
    # The quality focal loss of the qualities 0 and 1.
    quality = Quality(
        PolyFocal(gamma, (epsilon,)),
        negative=1.0 if alpha is None else 1.0 - alpha,
        positive=1.0 if alpha is None else alpha,
        epsilon=epsilon,
        beta=gamma,
    )
    return _loss(
        probabilities, target, weight, quality, use_sigmoid, True, class_weight, ignore_index,
        reduction, avg_factor,
    )  # fmt: skip


def check_beta(beta: float, epsilon: float) -> None:
    """Raises UserError where the quality focal loss would not be least at p = y."""
    check_epsilons([epsilon])
    if epsilon < 0 and beta < _LEAST_BETA:
        raise UserError(
            f"epsilon={epsilon} is given with beta={beta}: below epsilon 0 the loss is least at"
            f" p = y only for beta >= {_LEAST_BETA}"
        )


def check_mix(alpha: float) -> None:
    """Raises UserError unless the prediction's part of the target is in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha}: expected a number in [0, 1]")


def _loss(
    logits: Tensor,
    target: Target,
    weight: Tensor | None,
    quality: Quality,
    use_sigmoid: bool,
    activated: bool,
    class_weight: Sequence[float] | Tensor | None,
    ignore_index: int | None,
    reduction: str,
    avg_factor: Tensor | float | None,
    zero_is_negative: bool = False,
) -> Tensor:
    """Checks, computes, weighs and reduces: the one path of the functions above."""
    check_form("IoU-aware losses", use_sigmoid, True)
    check_reduction(reduction, avg_factor)
    check_class_weight(class_weight)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    labels, scores = _split(logits, target, ignore_index, activated)
    with autocast_off(logits.device.type):
        scores = scores.detach().to(dtype).clamp(0.0, 1.0)
        keep = None
        if labels.dim() == 1 and ignore_index is not None:
            keep = labels != ignore_index
            labels = torch.where(keep, labels, logits.shape[1])
            # Whatever the ignored rows hold, NaN too.
            logits = torch.where(keep.unsqueeze(1), logits, 0.0)
        if zero_is_negative and labels.dim() == 1:
            labels = torch.where(scores > 0, labels, logits.shape[1])
        per_class = _per_class("class_weight", class_weight, logits, logits.shape[-1], dtype)
        if weight is not None:
            weight = expand_weight(weight, logits.shape, dtype)
        if keep is not None:
            kept = keep.unsqueeze(1).to(dtype)
            weight = kept if weight is None else weight * kept
        scale = mean_scale(logits.shape, keep, avg_factor, dtype) if reduction == "mean" else 1.0
        return quality_loss(
            logits,
            labels,
            scores,
            quality,
            1.0 if per_class is None else per_class,
            weight,
            reduction != "none",
            scale,
            activated,
        )


def _split(
    logits: Tensor, target: Target, ignore_index: int | None, activated: bool
) -> tuple[Tensor, Tensor]:
    """Labels and scores: (N,) both, or (N, C), the labels then True at the positives."""
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[1] == 0:
        raise UserError(
            f"got logits {tuple(logits.shape)} {logits.dtype}: expected floating point (N, C) with"
            " at least one column"
        )
    seen = can_read(logits)
    if activated and seen and logits.numel():
        _check_range("the probabilities", logits)
    if isinstance(target, Tensor) and target.shape == logits.shape and target.is_floating_point():
        if seen and target.numel():
            _check_range("the scores", target)
        return target > 0, target
    if isinstance(target, Tensor):
        labels, scores = target, logits.new_ones(len(target) if target.dim() else 1)
    elif isinstance(target, tuple | list) and len(target) == 2:
        labels, scores = target
    else:
        raise UserError(
            f"got a target {type(target).__name__}: expected (labels, scores), labels (N,), or"
            " scores of the logits' shape"
        )
    rows = logits.shape[:1]
    if labels.shape != rows or labels.dtype != torch.int64:
        raise UserError(
            f"got labels {tuple(labels.shape)} {labels.dtype} for logits {tuple(logits.shape)}:"
            " expected (N,) of dtype torch.int64, or floating-point scores of the logits' shape"
        )
    if scores.shape != rows or not scores.is_floating_point():
        raise UserError(
            f"got scores {tuple(scores.shape)} {scores.dtype} for labels {tuple(labels.shape)}:"
            " expected floating point of the same shape"
        )
    if seen and len(labels):
        valid = (labels >= 0) & (labels <= logits.shape[1])
        if ignore_index is not None:
            valid = valid | (labels == ignore_index)
        if not valid.all():
            raise UserError(
                f"label {labels[~valid][0].item()} is out of range ({(~valid).sum().item()} of"
                f" {len(labels)} labels are): expected 0 to {logits.shape[1]}"
                f" ({logits.shape[1]} is background)"
            )
        positive = scores[(labels >= 0) & (labels < logits.shape[1])]
        if len(positive):
            _check_range("the scores of the positives", positive)
    return labels, scores


def _check_range(name: str, values: Tensor) -> None:
    low, high = _bounds(values.detach())
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:  # also when NaN
        raise UserError(f"{name} range from {low:.4g} to {high:.4g}: expected 0 to 1")


class QualityLoss(ClassificationLoss):
    """A loss of this file: its epsilon, and what they all take."""

    def __init__(
        self,
        epsilon: float | None,
        use_sigmoid: bool | None,
        reduction: str,
        loss_weight: float,
        class_weight: Sequence[float] | Tensor | None,
        ignore_index: int | None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, None, class_weight, ignore_index)
        name = type(self).__name__
        if epsilon is None:
            raise UserError(
                f"{name} has no epsilon: write one, >= -1 (0 is the loss without the Poly-1 term);"
                " the best value depends on the task"
            )
        check_form(name, use_sigmoid, True)
        check_epsilons([epsilon])
        self.epsilon = epsilon

    def tunable(self) -> dict[str, Range]:
        return {"epsilon": EPSILON, "loss_weight": LOSS_WEIGHT}


class Poly1QualityFocalLoss(QualityLoss):
    """Poly-1 quality focal loss, :func:`polyfocal.losses.quality.poly1_quality_focal_loss`.

    Args:
        epsilon: >= -1; 0 is the quality focal loss. It has no default: the best value depends on
            the task.
        beta: >= 0; at least 0.2 for a negative epsilon.
        activated: the head gives probabilities, as TOODHead does.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        beta: float = 2.0,
        activated: bool = False,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(epsilon, use_sigmoid, reduction, loss_weight, class_weight, ignore_index)
        check_nonnegative("beta", beta)
        check_beta(beta, self.epsilon)
        self.beta = beta
        self.activated = activated

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return poly1_quality_focal_loss(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            beta=self.beta,
            activated=self.activated,
            **common,
        )


class Poly1VarifocalLoss(QualityLoss):
    """Poly-1 varifocal loss, :func:`polyfocal.losses.quality.poly1_varifocal_loss`.

    Args:
        epsilon: >= -1; 0 is the varifocal loss. It has no default.
        alpha: >= 0, weighs the negatives; it is not the focal loss's alpha.
        gamma: >= 0.
        iou_weighted: the quality weighs the positives.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    alpha: float

    def __init__(
        self,
        epsilon: float | None = None,
        alpha: float = 0.75,
        gamma: float = 2.0,
        iou_weighted: bool = True,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(epsilon, use_sigmoid, reduction, loss_weight, class_weight, ignore_index)
        check_nonnegative("alpha", alpha)
        check_nonnegative("gamma", gamma)
        self.alpha = alpha
        self.gamma = gamma
        self.iou_weighted = iou_weighted

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return poly1_varifocal_loss(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            alpha=self.alpha,
            gamma=self.gamma,
            iou_weighted=self.iou_weighted,
            **common,
        )


class Poly1MatchabilityAwareLoss(QualityLoss):
    """Poly-1 MAL, :func:`polyfocal.losses.quality.poly1_matchability_aware_loss`.

    Args:
        epsilon: >= -1; 0 is the matchability-aware loss. It has no default.
        gamma: >= 0.
        alpha: >= 0, weighs the negatives; None for 1.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    alpha: float | None

    def __init__(
        self,
        epsilon: float | None = None,
        gamma: float = 1.5,
        alpha: float | None = None,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(epsilon, use_sigmoid, reduction, loss_weight, class_weight, ignore_index)
        check_nonnegative("gamma", gamma)
        if alpha is not None:
            check_nonnegative("alpha", alpha)
        self.gamma = gamma
        self.alpha = alpha

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return poly1_matchability_aware_loss(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            gamma=self.gamma,
            alpha=self.alpha,
            **common,
        )


class Poly1IoUAwareBCELoss(QualityLoss):
    """Poly-1 IoU-aware BCE, :func:`polyfocal.losses.quality.poly1_iou_aware_bce`.

    Args:
        epsilon: >= -1; 0 is the IoU-aware binary cross-entropy. It has no default.
        alpha: in [0, 1], the prediction's part of the target; it is not the focal loss's alpha.
        gamma: >= 0.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    alpha: float

    def __init__(
        self,
        epsilon: float | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(epsilon, use_sigmoid, reduction, loss_weight, class_weight, ignore_index)
        check_mix(alpha)
        check_nonnegative("gamma", gamma)
        self.alpha = alpha
        self.gamma = gamma

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return poly1_iou_aware_bce(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            alpha=self.alpha,
            gamma=self.gamma,
            **common,
        )
