"""Poly-N."""

from collections.abc import Sequence

from torch import Tensor

from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import poly_loss
from polyfocal.losses.settings import (
    ALPHA,
    GAMMA,
    Coefficients,
    Common,
    PerClass,
    Shared,
    Unpack,
    loss_function,
)
from polyfocal.ops import PolyFocal


@loss_function(epsilons=Coefficients(), gamma=GAMMA, alpha=ALPHA)
def poly_n_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    epsilons: Sequence[float],
    use_sigmoid: bool,
    gamma: float = 0.0,
    alpha: PerClass | None = None,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-N, :math:`\alpha_t [-(1-p_t)^\gamma \log p_t + \sum_j \epsilon_j (1-p_t)^{\gamma+j}]`.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`.
        epsilons: (epsilon_1, ..., epsilon_N), epsilon_j >= -1/j.
        use_sigmoid, alpha: as in :func:`~polyfocal.losses.focal.focal_loss`.
        gamma: >= 0; 0, the default, perturbs cross-entropy, as the paper does.

    Source: Leng et al., PolyLoss (2022), Poly-N.
    """
    poly = PolyFocal(gamma, tuple(epsilons))
    return poly_loss(logits, target, weight, use_sigmoid, poly, alpha, **common)


class PolyNLoss(ClassificationLoss):
    """Poly-N, :func:`polyfocal.losses.functional.poly_n_loss`.

    Args:
        epsilons: (epsilon_1, ..., epsilon_N), epsilon_j >= -1/j.
        gamma: >= 0; 0, the default, perturbs cross-entropy, as the paper does.
        alpha: in [0, 1], one number or one per class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = poly_n_loss

    def __init__(
        self,
        epsilons: Sequence[float],
        gamma: float = 0.0,
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, epsilons=epsilons, gamma=gamma, alpha=alpha, **shared)
