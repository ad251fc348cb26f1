"""Members of the focal family that were made for calibration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import ALPHA, GAMMA, ClassificationLoss, Range
from polyfocal.losses.functional import PerClass


class DualFocalLoss(ClassificationLoss):
    """Dual focal loss, :func:`polyfocal.losses.functional.dual_focal_loss`.

    Args:
        gamma: >= 0. It has no default, as in the author's code, where 0 is cross-entropy.
        use_sigmoid: False; the loss compares two classes of one softmax.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        gamma: float,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, None, class_weight, ignore_index)
        functional.check_nonnegative("gamma", gamma)
        functional.check_form("dual focal loss", use_sigmoid, False)
        self.gamma = gamma

    def tunable(self) -> dict[str, Range]:
        return {"gamma": GAMMA, **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.dual_focal_loss(pred, target, weight, gamma=self.gamma, **common)


class SampleDependentFocalLoss(ClassificationLoss):
    """Focal loss with a gamma for each range of p_t; the defaults are FLSD-53.

    See :func:`polyfocal.losses.functional.stepped_focal_loss`.

    Args:
        gammas: one more than edges.
        edges: ascending, in [0, 1].
        alpha: in [0, 1], one number or one a class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        gammas: Sequence[float] = (5.0, 3.0, 3.0),
        edges: Sequence[float] = (0.2, 0.5),
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        functional.check_steps(edges, gammas)
        self.gammas = tuple(gammas)
        self.edges = tuple(edges)

    def tunable(self) -> dict[str, Range]:
        return {"alpha": ALPHA, **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.stepped_focal_loss(
            pred,
            target,
            weight,
            edges=self.edges,
            gammas=self.gammas,
            alpha=self.alpha,
            **common,
        )


class AdaFocalLoss(ClassificationLoss):
    r"""AdaFocal: focal loss whose gamma follows the calibration on validation data, bin by bin.

    The loss of a row is :func:`polyfocal.losses.functional.stepped_focal_loss` with a gamma for
    each of ``num_bins`` bins of p_t. After each epoch :meth:`update` moves them, with conf_b and
    acc_b the mean confidence and the accuracy of bin b on validation data:

    .. math:: \gamma_b \leftarrow \gamma_b\, e^{\pm\lambda (conf_b - acc_b)}

    the sign being that of gamma_b. A gamma within (-0.2, 0.2) jumps to the other side: from focal
    to inverse focal where the model is too modest, and back. ``polyfocal.AdaFocalHook`` does all
    of it in a Runner.

    Args:
        num_bins: of equal mass.
        rate: lambda > 0.
        gamma: at the start, in all bins; not within (-0.2, 0.2).
        low, high: bounds of gamma.
        use_sigmoid: False.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.

    Source: Ghosh et al., AdaFocal: Calibration-aware Adaptive Focal Loss (2022), and its code.
    """

    edges: Tensor
    gammas: Tensor
    _SWITCH = 0.2

    def __init__(
        self,
        num_bins: int = 15,
        rate: float = 1.0,
        gamma: float = 1.0,
        low: float = -2.0,
        high: float = 20.0,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, None, class_weight, ignore_index)
        functional.check_form("AdaFocal loss", use_sigmoid, False)
        functional.check_nonnegative("rate", rate)
        if not isinstance(num_bins, int) or num_bins < 1:
            raise UserError(f"num_bins={num_bins}: expected a whole number >= 1")
        if not (low <= gamma <= high and abs(gamma) >= self._SWITCH):
            raise UserError(
                f"gamma={gamma}: expected a number in [{low}, {high}] and not within (-0.2, 0.2)"
            )
        self.num_bins = num_bins
        self.rate = rate
        self.low = low
        self.high = high
        # Saved with the optimizer's state, by the hook, and not with the model's weights.
        edges = torch.linspace(0.0, 1.0, num_bins + 1)[1:-1]
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("gammas", torch.full((num_bins,), float(gamma)), persistent=False)

    def update(self, confidence: Tensor, correct: Tensor) -> None:
        """Moves the gammas by what a validation set shows.

        Args:
            confidence: (M,) largest probability of each sample, M >= num_bins.
            correct: (M,) bool or 0/1, whether that class was the label.

        Raises:
            UserError: fewer samples than bins, or shapes that differ.
        """
        if confidence.dim() != 1 or confidence.shape != correct.shape:
            raise UserError(
                f"confidence {tuple(confidence.shape)} and correct {tuple(correct.shape)}: expected"
                " two tensors (M,)"
            )
        if len(confidence) < self.num_bins:
            raise UserError(
                f"{len(confidence)} validation samples for num_bins={self.num_bins}: expected at"
                " least one a bin"
            )
        order = confidence.argsort()
        bins = [part.to(confidence.device) for part in order.cpu().tensor_split(self.num_bins)]
        gap = torch.stack([confidence[b].mean() - correct[b].float().mean() for b in bins])
        edges = torch.stack([confidence[b].min() for b in bins[1:]]) if len(bins) > 1 else gap[:0]
        gap = gap.to(self.gammas)
        sign = torch.sign(self.gammas)
        moved = self.gammas * torch.exp(sign * self.rate * gap)
        moved = torch.where(moved.abs() < self._SWITCH, -sign * self._SWITCH, moved)
        self.gammas.copy_(moved.clamp(self.low, self.high))
        self.edges.copy_(edges)

    def tunable(self) -> dict[str, Range]:
        return {"rate": Range(0.1, 10.0, log=True), **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.stepped_focal_loss(
            pred, target, weight, edges=self.edges, gammas=self.gammas, **common
        )
