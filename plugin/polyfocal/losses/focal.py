"""Focal loss."""

from torch import Tensor

from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import poly_loss
from polyfocal.losses.settings import (
    ALPHA,
    GAMMA,
    Common,
    PerClass,
    Shared,
    Unpack,
    loss_function,
)
from polyfocal.ops import PolyFocal


@loss_function(gamma=GAMMA, alpha=ALPHA)
def focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    use_sigmoid: bool,
    gamma: float = 2.0,
    alpha: PerClass | None = 0.25,
    **common: Unpack[Common],
) -> Tensor:
    r"""Focal loss, :math:`FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t`.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`.
        use_sigmoid: one binary problem per class (True), or one softmax over the classes (False).
        gamma: >= 0; 0 is cross-entropy.
        alpha: in [0, 1]: a number, one per class, or None for no such weight. In the softmax form,
            which has no targets 0, it multiplies the rows of its class.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equation 5.
    """
    return poly_loss(logits, target, weight, use_sigmoid, PolyFocal(gamma), alpha, **common)


class FocalLoss(ClassificationLoss):
    """Focal loss, :func:`polyfocal.losses.functional.focal_loss`.

    Args:
        gamma: >= 0.
        alpha: in [0, 1], one number or one per class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.

    Example:
        >>> loss_cls = FocalLoss(use_sigmoid=True)
        >>> loss_cls(torch.zeros(2, 3), torch.tensor([1, 3]), avg_factor=1)
    """

    function = focal_loss

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: PerClass | None = 0.25,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, gamma=gamma, alpha=alpha, **shared)
