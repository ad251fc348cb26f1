"""Poly-1 matchability-aware loss (MAL)."""

from torch import Tensor

from polyfocal.losses.quality import FORM, QualityLoss, Target, weighed_quality
from polyfocal.losses.settings import EPSILON, Common, Number, Shared, Unpack, loss_function
from polyfocal.ops.poly_focal import PolyFocal
from polyfocal.ops.quality import Quality


@loss_function(epsilon=EPSILON, gamma=Number(), alpha=Number(optional=True), use_sigmoid=FORM)
def poly1_matchability_aware_loss(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    gamma: float = 1.5,
    alpha: float | None = None,
    use_sigmoid: bool = True,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-1 matchability-aware loss (MAL).

    .. math::
        L = \begin{cases}
            -t \log p - (1 - t) \log(1 - p) + \epsilon\, m(p, t), \;
                t = y^\gamma & \text{positive} \\
            \alpha \bar p^\gamma\, [-\log(1 - p) + \epsilon\, p] & \text{negative}
        \end{cases}

    with m as in
    ``poly1_varifocal_loss`` and :math:`\bar p` the value of p without a gradient,
    as in the published code: the gradient is not that of the value.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            ``poly1_quality_focal_loss``. In the form (labels, scores) a positive with quality 0
            stays a positive, which learns 0 with the weight 1.
        epsilon: >= -1; 0 is the matchability-aware loss.
        gamma: >= 0, of the targets and of the negatives' modulator.
        alpha: >= 0, weighs the negatives; None for 1.
        use_sigmoid: True, the only form.

    Returns, raises: as ``poly1_quality_focal_loss``.

    Source: Huang et al., DEIM (2025), equation 4; Leng et al., PolyLoss (2022).
    """
    quality = Quality(
        PolyFocal(gamma, (epsilon,)),
        negative=1.0 if alpha is None else alpha,
        epsilon=epsilon,
        power=gamma,
        detached=True,
    )
    return weighed_quality(logits, target, weight, quality, **common)


class Poly1MatchabilityAwareLoss(QualityLoss):
    """Poly-1 MAL, :func:`polyfocal.losses.functional.poly1_matchability_aware_loss`.

    Args:
        epsilon: >= -1; 0 is the matchability-aware loss. It has no default.
        gamma: >= 0.
        alpha: >= 0, weighs the negatives; None for 1.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = poly1_matchability_aware_loss

    def __init__(
        self,
        epsilon: float | None = None,
        gamma: float = 1.5,
        alpha: float | None = None,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, epsilon=epsilon, gamma=gamma, alpha=alpha, **shared)
