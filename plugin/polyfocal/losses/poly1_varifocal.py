"""Poly-1 varifocal loss."""

from torch import Tensor

from polyfocal.losses.quality import FORM, QualityLoss, Target, weighed_quality
from polyfocal.losses.settings import (
    EPSILON,
    Common,
    Flag,
    Number,
    Shared,
    Unpack,
    loss_function,
)
from polyfocal.ops.poly_focal import PolyFocal
from polyfocal.ops.quality import Quality


@loss_function(
    epsilon=EPSILON, alpha=Number(), gamma=Number(), iou_weighted=Flag(), use_sigmoid=FORM
)
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
    **common: Unpack[Common],
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
            ``poly1_quality_focal_loss``. A positive with quality 0 counts as a negative.
        epsilon: >= -1; 0 is the varifocal loss.
        alpha: >= 0, weighs the negatives.
        gamma: >= 0, power of the negatives' modulator.
        iou_weighted: y weighs the positives; else 1 does.
        use_sigmoid: True, the only form.

    Returns, raises: as ``poly1_quality_focal_loss``.

    Source: Zhang et al., VarifocalNet (2021), equation 2; Leng et al., PolyLoss (2022).
    """
    quality = Quality(
        PolyFocal(gamma, (epsilon,)), negative=alpha, epsilon=epsilon, by_score=iou_weighted
    )
    return weighed_quality(logits, target, weight, quality, zero_is_negative=True, **common)


class Poly1VarifocalLoss(QualityLoss):
    """Poly-1 varifocal loss, :func:`polyfocal.losses.functional.poly1_varifocal_loss`.

    Args:
        epsilon: >= -1; 0 is the varifocal loss. It has no default.
        alpha: >= 0, weighs the negatives; it is not the focal loss's alpha.
        gamma: >= 0.
        iou_weighted: the quality weighs the positives.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = poly1_varifocal_loss

    def __init__(
        self,
        epsilon: float | None = None,
        alpha: float = 0.75,
        gamma: float = 2.0,
        iou_weighted: bool = True,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            use_sigmoid,
            epsilon=epsilon,
            alpha=alpha,
            gamma=gamma,
            iou_weighted=iou_weighted,
            **shared,
        )
