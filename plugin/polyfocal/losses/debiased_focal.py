"""Debiased focal loss."""

import torch
from torch import Tensor

from polyfocal.losses.debiasing import (
    SETTINGS,
    BiasShared,
    DebiasingLoss,
    annealed,
    bias_miss,
    bias_rows,
    bias_training,
)
from polyfocal.losses.rows import prepare, weighed_poly
from polyfocal.losses.settings import ALPHA, GAMMA, Common, PerClass, Unpack, loss_function
from polyfocal.ops import PolyFocal


@loss_function(gamma=GAMMA, alpha=ALPHA, **SETTINGS)
def debiased_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias_logits: Tensor,
    use_sigmoid: bool,
    gamma: float = 2.0,
    alpha: PerClass | None = None,
    bias_weight: float = 1.0,
    theta: float = 1.0,
    **common: Unpack[Common],
) -> Tensor:
    r"""Debiased focal loss, :math:`-\alpha_t (1 - p^B_t)^\gamma \log p_t`.

    p^B_t is the probability that a model which sees only the bias gives to the target: what the
    bias explains weighs little. If ``bias_logits`` has a gradient, ``bias_weight`` times the
    cross-entropy of the bias model is added. The gradient of the first term then reaches the bias
    model too.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`.
        bias_logits: logits of the bias model, in the shape of ``logits``. In the softmax form
            logarithms of probabilities work too, with -inf for a class that the bias model
            excludes.
        use_sigmoid, gamma, alpha: as in :func:`~polyfocal.losses.focal.focal_loss`.
        bias_weight: lambda_h >= 0.
        theta: annealing, in [0, 1]: p^B is replaced by the normalised p^B to the power theta; at 0
            all classes are equally likely.

    Source: Karimi Mahabadi et al., End-to-End Bias Mitigation by Modelling Biases in Corpora
        (2020), debiased focal loss.
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    bias = bias_rows(rows, logits, bias_logits)
    modulator = bias_miss(rows, annealed(theta, bias))
    if gamma != 1:
        # A power below 1 has no finite slope at 0.
        modulator = modulator.clamp_min(torch.finfo(modulator.dtype).tiny) ** gamma
    loss = weighed_poly(rows, PolyFocal(), alpha, factor=modulator)
    return loss + bias_training(rows, bias_weight, bias)


class DebiasedFocalLoss(DebiasingLoss):
    """Debiased focal loss, :func:`polyfocal.losses.functional.debiased_focal_loss`.

    Args:
        gamma: >= 0.
        alpha: in [0, 1], one number or one per class; None for no such weight.
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`~polyfocal.losses.debiasing.DebiasingLoss`.
    """

    function = debiased_focal_loss

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        **shared: Unpack[BiasShared],
    ) -> None:
        super().__init__(use_sigmoid, gamma=gamma, alpha=alpha, **shared)
