"""Poly-1 for heatmaps of Gaussian bumps, as CenterPoint and CenterNet learn them."""

from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.base import Loss
from polyfocal.losses.rows import check_reduction, expand_weight, in_unit, mean_scale
from polyfocal.losses.settings import EPSILON, Number, Range, loss_function
from polyfocal.ops.poly_focal import compute_dtype

_TINY = 1e-12  # added to a probability, so that its logarithm is finite; MMDetection's value


@loss_function(epsilon=EPSILON, alpha=Number(Range(1.0, 4.0)), gamma=Number(Range(2.0, 6.0)))
def gaussian_poly1_focal_loss(
    probabilities: Tensor,
    heatmap: Tensor,
    weight: Tensor | None = None,
    *,
    epsilon: float,
    alpha: float = 2.0,
    gamma: float = 4.0,
    reduction: str = "mean",
    avg_factor: Tensor | float | None = None,
) -> Tensor:
    r"""Poly-1 Gaussian focal loss, of probabilities.

    .. math:: L = w_t [-(1 - p_t)^\alpha \log p_t + \epsilon (1 - p_t)^{\alpha + 1}]

    with :math:`p_t = p, w_t = 1` at the peaks, where the heatmap y is exactly 1, and
    :math:`p_t = 1 - p, w_t = (1 - y)^\gamma` elsewhere. w_t weighs both terms, as alpha_t does in
    :func:`~polyfocal.losses.poly1_focal.poly1_focal_loss`. alpha and gamma are named as in the
    Gaussian focal loss, whose alpha is the focal loss's gamma.

    Args:
        probabilities: any shape, floating point, in [0, 1]; at 0 and 1 exactly the loss is finite.
        heatmap: the same shape, in [0, 1].
        weight: the same shape.
        epsilon: >= -1; 0 is the Gaussian focal loss.
        alpha, gamma: >= 0.
        reduction, avg_factor: see :mod:`polyfocal.losses.rows`.

    Returns:
        A scalar, or for ``reduction='none'`` the probabilities' shape; float32, or float64 for
        float64 probabilities.

    Source: Law and Deng, CornerNet (2018), equation 1, and Leng et al., PolyLoss (2022); derived
    in docs/losses/gaussian_poly1_focal.md.
    """
    check_reduction(reduction, avg_factor)
    if not probabilities.is_floating_point() or heatmap.shape != probabilities.shape:
        raise UserError(
            f"got probabilities {tuple(probabilities.shape)} {probabilities.dtype}, heatmap"
            f" {tuple(heatmap.shape)} {heatmap.dtype}: expected floating point and one shape"
        )
    dtype = compute_dtype(probabilities)
    p = in_unit(probabilities.to(dtype), "probabilities range")
    y = in_unit(heatmap.detach().to(dtype), "the heatmap ranges")
    peak = y == 1
    p_t, q_t = torch.where(peak, p, 1 - p), torch.where(peak, 1 - p, p)
    # At q_t = 0 a power below 1 has an infinite slope; below the limit it has none.
    q_t = q_t.clamp_min(_TINY)
    loss = -(q_t**alpha) * torch.log(p_t + _TINY)
    if epsilon:
        loss = loss + epsilon * q_t ** (alpha + 1)
    loss = loss * torch.where(peak, 1.0, (1 - y) ** gamma)
    if weight is not None:
        loss = loss * expand_weight(weight, loss.shape, dtype)
    if reduction == "none":
        return loss
    scale = mean_scale(loss.shape, None, avg_factor, dtype) if reduction == "mean" else 1.0
    return loss.sum() * scale


class GaussianPoly1FocalLoss(Loss):
    """Poly-1 Gaussian focal loss, :func:`polyfocal.losses.functional.gaussian_poly1_focal_loss`.

    It replaces MMDetection's GaussianFocalLoss, also in CenterNetUpdateHead, which names the
    positives. ``alpha`` and ``gamma`` mean the same as there, which differs from their meaning in a
    focal loss. ``pred`` are probabilities of any shape, in [0, 1]. ``target`` is a heatmap of that
    shape, 1 at the peaks. ``avg_factor`` is usually the number of peaks.

    Args:
        epsilon: >= -1; 0 is the Gaussian focal loss. It has no default: the best value depends on
            the task.
        alpha: power of the modulator, >= 0.
        gamma: power of 1 - y in the weight of the entries below a peak, >= 0.
        reduction: 'none', 'mean' or 'sum', see :mod:`polyfocal.losses.rows`.
        loss_weight: factor on the result, >= 0.
        pos_weight, neg_weight: factors, >= 0, on the peaks (or the positives that a head names) and
            on the rest.

    Raises:
        UserError: a value out of its range, or no epsilon.
    """

    function = gaussian_poly1_focal_loss
    settings: ClassVar[dict[str, Any]] = {"pos_weight": Number(), "neg_weight": Number()}
    pos_weight: float
    neg_weight: float
    _inputs = ("pos_inds", "pos_labels")

    def __init__(
        self,
        epsilon: float | None = None,
        alpha: float = 2.0,
        gamma: float = 4.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        pos_weight: float = 1.0,
        neg_weight: float = 1.0,
    ) -> None:
        super().__init__(reduction, loss_weight, epsilon=epsilon, alpha=alpha, gamma=gamma)
        self.pos_weight = pos_weight
        self.neg_weight = neg_weight

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        pos_inds: Optional[Tensor] = None,
        pos_labels: Optional[Tensor] = None,
    ) -> Tensor:
        """The weighted and reduced loss times ``loss_weight``.

        Args:
            pred, target, weight, avg_factor: as the function's probabilities, heatmap, weight and
                avg_factor.
            reduction_override: takes the place of ``reduction`` for this call.
            pos_inds, pos_labels: (M,) rows and columns of the positives, of predictions (N, C).
                Every entry then is a negative too, weighed by its target.
        """
        positives = (pos_inds, pos_labels)
        return self._weighed(pred, target, weight, avg_factor, reduction_override, None, positives)

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        rows, columns = common.pop("pos_inds"), common.pop("pos_labels")
        if rows is None or columns is None:
            if not self.pos_weight == self.neg_weight == 1.0:
                factor = torch.where(target == 1, self.pos_weight, self.neg_weight)
                weight = factor if weight is None else weight * factor
            return super().compute(pred, target, weight, **common)
        if common["reduction"] == "none":
            raise UserError("reduction='none' is given with pos_inds: expected 'mean' or 'sum'")
        peaks = pred[rows, columns]
        positive = super().compute(peaks, torch.ones_like(peaks), None, **common)
        negative = super().compute(pred, target, (target < 1).to(target.dtype), **common)
        return self.pos_weight * positive + self.neg_weight * negative
