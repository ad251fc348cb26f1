"""Poly-1 IoU-aware binary cross-entropy."""

from torch import Tensor

from polyfocal.losses.quality import FORM, QualityLoss, Target, weighed_quality
from polyfocal.losses.settings import EPSILON, Common, Number, Shared, Unpack, loss_function
from polyfocal.ops.poly_focal import PolyFocal
from polyfocal.ops.quality import Quality


@loss_function(epsilon=EPSILON, alpha=Number(high=1.0), gamma=Number(), use_sigmoid=FORM)
def poly1_iou_aware_bce(
    logits: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    use_sigmoid: bool = True,
    **common: Unpack[Common],
) -> Tensor:
    r"""Poly-1 IoU-aware binary cross-entropy.

    .. math::
        L = \begin{cases}
            -t \log p - (1 - t) \log(1 - p) + \epsilon\, m(p, t), \;
                t = \max(\bar p^\alpha y^{1 - \alpha}, 0.01) & \text{positive} \\
            -p^\gamma \log(1 - p) + \epsilon\, p^{\gamma + 1} & \text{negative}
        \end{cases}

    with m as in
    ``poly1_varifocal_loss`` and :math:`\bar p` the value of p without a gradient.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            ``poly1_quality_focal_loss``. In the form (labels, scores) a positive with quality 0
            stays a positive, which learns 0.01.
        epsilon: >= -1; 0 is the IoU-aware binary cross-entropy.
        alpha: in [0, 1], the prediction's part of the target.
        gamma: >= 0, power of the negatives' modulator.
        use_sigmoid: True, the only form.

    Returns, raises: as ``poly1_quality_focal_loss``.

    Source: Cai et al., Align-DETR (2023), equations 3 and 4, and the lower limit of RF-DETR's
    code; Leng et al., PolyLoss (2022).
    """
    quality = Quality(PolyFocal(gamma, (epsilon,)), epsilon=epsilon, mix=alpha, floor=0.01)
    return weighed_quality(logits, target, weight, quality, **common)


class Poly1IoUAwareBCELoss(QualityLoss):
    """Poly-1 IoU-aware BCE, :func:`polyfocal.losses.functional.poly1_iou_aware_bce`.

    Args:
        epsilon: >= -1; 0 is the IoU-aware binary cross-entropy. It has no default.
        alpha: in [0, 1], the prediction's part of the target; it is not the focal loss's alpha.
        gamma: >= 0.
        use_sigmoid: True.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = poly1_iou_aware_bce
    monotone = False  # its target moves with p

    def __init__(
        self,
        epsilon: float | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, epsilon=epsilon, alpha=alpha, gamma=gamma, **shared)
