"""Poly-1 quality focal loss."""

from torch import Tensor

from polyfocal.losses.quality import FORM, QualityLoss, Target, check_beta, weighed_quality
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


@loss_function(epsilon=EPSILON, beta=Number(), activated=Flag(), use_sigmoid=FORM)
def poly1_quality_focal_loss(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    beta: float = 2.0,
    use_sigmoid: bool = True,
    activated: bool = False,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-1 quality focal loss.

    .. math:: L = |y - p|^\beta\, [-y \log p - (1 - y) \log(1 - p)] + \epsilon\, |y - p|^{\beta + 1}

    Args:
        logits: (N, C), floating point; probabilities in [0, 1] with ``activated``.
        target: see :mod:`polyfocal.losses.quality`.
        weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.rows`. Without an ``avg_factor`` a mean is over the N C
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
    check_beta(beta, epsilon)
    quality = Quality(PolyFocal(beta, (epsilon,)), epsilon=epsilon, beta=beta)
    return weighed_quality(logits, target, weight, quality, activated, **common)


class Poly1QualityFocalLoss(QualityLoss):
    """Poly-1 quality focal loss, :func:`polyfocal.losses.functional.poly1_quality_focal_loss`.

    Args:
        epsilon: >= -1; 0 is the quality focal loss. It has no default: the best value depends on
            the task.
        beta: >= 0; at least 0.2 for a negative epsilon.
        activated: the head gives probabilities, as TOODHead does.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = poly1_quality_focal_loss
    beta: float
    epsilon: float

    def __init__(
        self,
        epsilon: float | None = None,
        beta: float = 2.0,
        activated: bool = False,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, epsilon=epsilon, beta=beta, activated=activated, **shared)
        check_beta(self.beta, self.epsilon)
