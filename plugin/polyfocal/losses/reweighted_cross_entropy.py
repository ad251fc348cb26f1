"""Example reweighting."""

import torch
from torch import Tensor

from polyfocal.losses.debiasing import (
    SETTINGS,
    BiasShared,
    DebiasingLoss,
    bias_miss,
    bias_rows,
    bias_training,
)
from polyfocal.losses.rows import mean_scale, prepare, weighed_poly
from polyfocal.losses.settings import Common, Unpack, loss_function
from polyfocal.ops import PolyFocal


@loss_function(**SETTINGS)
def reweighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    bias_logits: Tensor,
    use_sigmoid: bool,
    bias_weight: float = 1.0,
    theta: float = 1.0,
    **common: Unpack[Common],
) -> Tensor:
    r"""Cross-entropy with the weights :math:`w_i = (1 - p^B_t)^\theta` over their mean.

    So the mean over a batch is :math:`\sum_i w_i CE_i / \sum_i w_i`. The weights have no
    gradient.

    Args:
        logits, target, weight, bias_logits, use_sigmoid, bias_weight, class_weight,
            ignore_index, reduction, avg_factor: as in
            :func:`~polyfocal.losses.debiased_focal.debiased_focal_loss`.
        theta: annealing, in [0, 1]: the power of the weights.

    Source: Utama et al. (2020), example reweighting, and its code for the annealing.
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    bias = bias_rows(rows, logits, bias_logits)
    miss = bias_miss(rows, bias.detach()) ** theta
    counted = (
        miss
        if rows.keep is None
        else torch.where(rows.keep if miss.dim() == 1 else rows.keep.unsqueeze(1), miss, 0.0)
    )
    mean = counted.sum() * mean_scale(miss.shape, rows.keep, None, miss.dtype)
    miss = miss / mean.clamp_min(torch.finfo(miss.dtype).tiny)
    loss = weighed_poly(rows, PolyFocal(), factor=miss)
    return loss + bias_training(rows, bias_weight, bias)


class ReweightedCrossEntropyLoss(DebiasingLoss):
    """Example reweighting, :func:`polyfocal.losses.functional.reweighted_cross_entropy`.

    Args:
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`~polyfocal.losses.debiasing.DebiasingLoss`.
    """

    function = reweighted_cross_entropy

    def __init__(self, use_sigmoid: bool | None = None, **shared: Unpack[BiasShared]) -> None:
        super().__init__(use_sigmoid, **shared)
