"""Poly-1 focal loss."""

from typing import Any, ClassVar

from torch import Tensor

from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.quality import Target, weighed_quality
from polyfocal.losses.rows import poly_loss
from polyfocal.losses.settings import (
    ALPHA,
    EPSILON,
    GAMMA,
    Common,
    Flag,
    Form,
    Number,
    PerClass,
    Shared,
    Unpack,
    loss_function,
)
from polyfocal.ops import PolyFocal
from polyfocal.ops.quality import Quality

OF_PROBABILITIES = Form(only=True, what="focal loss of probabilities")
_ALPHA = Number(high=1.0, optional=True, why=" or None, since the loss is of probabilities")


@loss_function(epsilon=EPSILON, gamma=GAMMA, alpha=ALPHA)
def poly1_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    use_sigmoid: bool,
    gamma: float = 2.0,
    alpha: PerClass | None = 0.25,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-1 focal loss.

    .. math:: L = \alpha_t [-(1 - p_t)^\gamma \log p_t + \epsilon (1 - p_t)^{\gamma + 1}]

    alpha_t weighs both terms, so that epsilon = -1 takes away exactly the leading power of the
    focal loss and the loss stays non-negative and monotone in p_t for every epsilon >= -1. Code
    that weighs the first term only gives another meaning to epsilon; its values do not carry over.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`.
        epsilon: >= -1; 0 is the focal loss.
        use_sigmoid, gamma, alpha: as in :func:`~polyfocal.losses.focal.focal_loss`.

    Source: Leng et al., PolyLoss (2022), its form for the alpha-balanced focal loss.
    """
    poly = PolyFocal(gamma, (epsilon,))
    return poly_loss(logits, target, weight, use_sigmoid, poly, alpha, **common)


@loss_function(
    epsilon=EPSILON,
    gamma=GAMMA,
    alpha=_ALPHA,
    use_sigmoid=OF_PROBABILITIES,
)
def poly1_focal_of_probabilities(
    probabilities: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    gamma: float = 2.0,
    alpha: float | None = 0.25,
    use_sigmoid: bool = True,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-1 focal loss of probabilities, where a head has no logits.

    .. math:: L = \alpha_t [-(1 - p_t)^\gamma \log p_t + \epsilon (1 - p_t)^{\gamma + 1}]

    Args:
        probabilities: (N, C) in [0, 1]. At 0 and 1 exactly the logarithm is -100.
        target: labels (N,) in [0, C], C being background.
        weight, class_weight, ignore_index, reduction, avg_factor, epsilon: see
            ``poly1_quality_focal_loss``.
        gamma: >= 0.
        alpha: in [0, 1], or None for no such weight; one number.
        use_sigmoid: True, the only form.

    Returns, raises: as ``poly1_quality_focal_loss``.

    Source: :func:`poly1_focal_loss`.
    """
    # The quality focal loss of the qualities 0 and 1.
    quality = Quality(
        PolyFocal(gamma, (epsilon,)),
        negative=1.0 if alpha is None else 1.0 - alpha,
        positive=1.0 if alpha is None else alpha,
        epsilon=epsilon,
        beta=gamma,
    )
    return weighed_quality(probabilities, target, weight, quality, activated=True, **common)


class Poly1FocalLoss(ClassificationLoss):
    """Poly-1 focal loss, :func:`polyfocal.losses.functional.poly1_focal_loss`.

    Args:
        epsilon: >= -1. It has no default: the best value depends on the task, which is the
            paper's own finding.
        gamma: >= 0.
        alpha: in [0, 1], one number or one per class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
        activated: the head gives probabilities, as TOODHead does to its initial loss:
            :func:`poly1_focal_of_probabilities`. Sigmoid form; alpha is one number or None.
    """

    function = poly1_focal_loss
    settings: ClassVar[dict[str, Any]] = {"activated": Flag()}

    def __init__(
        self,
        epsilon: float | None = None,
        gamma: float = 2.0,
        alpha: PerClass | None = 0.25,
        use_sigmoid: bool | None = None,
        activated: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            use_sigmoid, epsilon=epsilon, gamma=gamma, alpha=alpha, activated=activated, **shared
        )
        if self.activated:
            OF_PROBABILITIES.checked("use_sigmoid", use_sigmoid, type(self).__name__)
            _ALPHA.checked("alpha", alpha, type(self).__name__)

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        if not self.activated:
            return super().compute(pred, target, weight, **common)
        own = dict(epsilon=self.epsilon, gamma=self.gamma, alpha=self.alpha)
        unchecked = poly1_focal_of_probabilities.unchecked  # type: ignore[attr-defined]
        return unchecked(pred, target, weight, **own, **common)
