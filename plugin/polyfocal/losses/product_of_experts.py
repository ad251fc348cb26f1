"""Product of experts."""

import torch
from torch import Tensor

from polyfocal.losses.debiasing import (
    SETTINGS,
    BiasShared,
    DebiasingLoss,
    annealed,
    bias_rows,
    bias_training,
)
from polyfocal.losses.rows import prepare, weighed_poly
from polyfocal.losses.settings import Common, Unpack, loss_function
from polyfocal.ops import PolyFocal


@loss_function(**SETTINGS)
def product_of_experts(
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
    r"""Product of experts: cross-entropy of :math:`\mathrm{softmax}(\log p + \log p^B)`.

    The model learns what the bias does not already say; at test time the model is used alone. In
    the sigmoid form the two log-odds are added.

    Args:
        logits, target, weight, bias_logits, use_sigmoid, bias_weight, theta, class_weight,
            ignore_index, reduction, avg_factor: as in
            :func:`~polyfocal.losses.debiased_focal.debiased_focal_loss`.

    Source: Clark et al. (2019); Karimi Mahabadi et al. (2020); Utama et al., Towards Debiasing NLU
        Models from Unknown Biases (2020).
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    bias = bias_rows(rows, logits, bias_logits)
    log_bias = bias if use_sigmoid else torch.log_softmax(bias, dim=1)
    both = rows.logits.to(bias.dtype) + annealed(theta, log_bias)
    loss = weighed_poly(rows, PolyFocal(), logits=both)
    return loss + bias_training(rows, bias_weight, bias)


class ProductOfExpertsLoss(DebiasingLoss):
    """Product of experts, :func:`polyfocal.losses.functional.product_of_experts`.

    Args:
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`~polyfocal.losses.debiasing.DebiasingLoss`.
    """

    function = product_of_experts

    def __init__(self, use_sigmoid: bool | None = None, **shared: Unpack[BiasShared]) -> None:
        super().__init__(use_sigmoid, **shared)
