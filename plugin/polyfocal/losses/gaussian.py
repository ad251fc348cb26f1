"""Poly-1 for heatmaps of Gaussian bumps, as CenterPoint and CenterNet learn them."""

from typing import Optional, Union

import torch
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import EPSILON, LOSS_WEIGHT, Range
from polyfocal.losses.reduction import check_reduction


class GaussianPoly1FocalLoss(nn.Module):
    """Poly-1 Gaussian focal loss, :func:`polyfocal.losses.functional.gaussian_poly1_focal_loss`.

    It takes the place of MMDetection's GaussianFocalLoss; ``alpha`` and ``gamma`` mean what they
    mean there, which is not what they mean in a focal loss.

    Args:
        epsilon: >= -1; 0 is the Gaussian focal loss. It has no default: the best value depends on
            the task.
        alpha: power of the modulator, >= 0.
        gamma: power with which a target near a peak weighs less as a negative, >= 0.
        reduction: 'none', 'mean' or 'sum', see :mod:`polyfocal.losses.reduction`.
        loss_weight: factor on the result, >= 0.

    Raises:
        UserError: a value out of its range, or no epsilon.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        alpha: float = 2.0,
        gamma: float = 4.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if epsilon is None:
            raise UserError(
                "GaussianPoly1FocalLoss has no epsilon: write one, >= -1 (0 is the Gaussian focal"
                " loss); the best value depends on the task"
            )
        functional.check_epsilons([epsilon])
        functional.check_nonnegative("alpha", alpha)
        functional.check_nonnegative("gamma", gamma)
        functional.check_nonnegative("loss_weight", loss_weight)
        check_reduction(reduction)
        self.epsilon = epsilon
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.loss_weight = loss_weight

    def tunable(self) -> dict[str, Range]:
        """The settings that a search may change, as in the other losses; the powers around 2, 4."""
        return {
            "epsilon": EPSILON,
            "alpha": Range(1.0, 4.0),
            "gamma": Range(2.0, 6.0),
            "loss_weight": LOSS_WEIGHT,
        }

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor's keywords."""
        names = ("epsilon", "alpha", "gamma", "reduction", "loss_weight")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
    ) -> Tensor:
        """The weighted and reduced loss times ``loss_weight``.

        Args:
            pred: probabilities of any shape, in [0, 1].
            target: heatmap of the same shape, in [0, 1]; 1 at the peaks.
            weight: of the same shape.
            avg_factor: what a mean divides by, as a rule the number of peaks.
            reduction_override: takes the place of ``reduction`` for this call.
        """
        return self._weighed(pred, target, weight, avg_factor, reduction_override)

    @torch.jit.unused
    def _weighed(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Optional[Tensor],
        avg_factor: Optional[Union[Tensor, float]],
        reduction_override: Optional[str],
    ) -> Tensor:
        loss = functional.gaussian_poly1_focal_loss(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction if reduction_override is None else reduction_override,
            avg_factor=avg_factor,
        )
        return loss if self.loss_weight == 1.0 else self.loss_weight * loss
