"""Poly-1 cross-entropy."""

from torch import Tensor

from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import poly_loss
from polyfocal.losses.settings import (
    EPSILON,
    SMOOTHING,
    Common,
    Shared,
    Unpack,
    check_smoothing,
    loss_function,
)
from polyfocal.ops import PolyFocal


@loss_function(epsilon=EPSILON, label_smoothing=SMOOTHING)
def poly1_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    use_sigmoid: bool = False,
    label_smoothing: float = 0.0,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-1 cross-entropy, :math:`-\log p_t + \epsilon (1 - p_t)`.

    With label smoothing a (softmax form), y_k = (1 - a) [k = y] + a / K:
    :math:`-\sum_k y_k \log p_k + \epsilon \sum_k y_k (1 - p_k)`.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`.
        epsilon: >= -1; 0 is cross-entropy.
        use_sigmoid: as in :func:`~polyfocal.losses.focal.focal_loss`; True is Poly-1 on binary
            cross-entropy.
        label_smoothing: a in [0, 1); softmax form with integer labels.

    Source: Leng et al., PolyLoss (2022), its pseudocode of Poly-1.
    """
    poly = PolyFocal(0.0, (epsilon,))
    return poly_loss(
        logits, target, weight, use_sigmoid, poly, label_smoothing=label_smoothing, **common
    )


class Poly1CrossEntropyLoss(ClassificationLoss):
    """Poly-1 cross-entropy, :func:`polyfocal.losses.functional.poly1_cross_entropy`.

    Args:
        epsilon: >= -1. The default is the paper's for Mask R-CNN on COCO; it uses +2 on ImageNet.
        use_sigmoid: False for softmax, the paper's; True for Poly-1 on binary cross-entropy.
        label_smoothing: in [0, 1), softmax form.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = poly1_cross_entropy

    def __init__(
        self,
        epsilon: float = -1.0,
        use_sigmoid: bool = False,
        label_smoothing: float = 0.0,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, epsilon=epsilon, label_smoothing=label_smoothing, **shared)
        check_smoothing(self.label_smoothing, use_sigmoid)
