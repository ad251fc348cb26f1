"""AdaFocal."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.sample_dependent_focal import stepped_focal_loss
from polyfocal.losses.settings import Form, Number, Range, Shared, Unpack, Whole, as_number

_ANY = Number(low=-math.inf)


class AdaFocalLoss(ClassificationLoss):
    r"""AdaFocal: focal loss whose gamma follows the calibration on validation data, bin by bin.

    The loss of a row is :func:`polyfocal.losses.functional.stepped_focal_loss` with a gamma for
    each of ``num_bins`` bins of p_t. After each epoch :meth:`update` moves them, with conf_b and
    acc_b the mean confidence and the accuracy of bin b on validation data:

    .. math:: \gamma_b \leftarrow \gamma_b\, e^{\pm\lambda (conf_b - acc_b)}

    the sign being that of gamma_b. A gamma within (-0.2, 0.2) jumps to the other side of zero, if
    ``low`` and ``high`` have that: from focal to inverse focal if the model is not confident
    enough, and back. In a Runner ``polyfocal.AdaFocalHook`` calls :meth:`update`.

    Args:
        num_bins: number of bins, each with the same number of samples.
        rate: lambda > 0.
        gamma: gamma of all bins at the start; not within (-0.2, 0.2).
        low, high: bounds of gamma.
        use_sigmoid: False.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.

    Source: Ghosh et al., AdaFocal: Calibration-aware Adaptive Focal Loss (2022), and its code.
    """

    function = stepped_focal_loss
    settings: ClassVar[dict[str, Any]] = {
        "num_bins": Whole(low=1),
        "rate": Number(Range(0.1, 10.0, log=True)),
        "low": _ANY,
        "high": _ANY,
        "use_sigmoid": Form(only=False, what="AdaFocal loss"),
        "alpha": None,
    }
    soft_targets = False
    monotone = False  # the loss jumps at the edge of a bin
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
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, num_bins=num_bins, rate=rate, low=low, high=high, **shared)
        start = as_number(gamma)
        if start is None or not (self.low <= start <= self.high and abs(start) >= self._SWITCH):
            raise UserError(
                f"gamma={gamma}: expected a number in [{low}, {high}] and not within (-0.2, 0.2)"
            )
        # Saved with the optimizer's state, by the hook, and not with the model's weights.
        self.edges = torch.linspace(0.0, 1.0, self.num_bins + 1)[1:-1]
        self.gammas = torch.full((self.num_bins,), float(start))

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
                " least one per bin"
            )
        order = confidence.argsort()
        bins = [part.to(confidence.device) for part in order.cpu().tensor_split(self.num_bins)]
        gap = torch.stack([confidence[b].mean() - correct[b].float().mean() for b in bins])
        edges = torch.stack([confidence[b].min() for b in bins[1:]]) if len(bins) > 1 else gap[:0]
        gap = gap.to(self.gammas)
        sign = torch.sign(self.gammas)
        moved = self.gammas * torch.exp(sign * self.rate * gap)
        other = -sign * self._SWITCH
        jumps = (moved.abs() < self._SWITCH) & (other >= self.low) & (other <= self.high)
        moved = torch.where(jumps, other, moved)
        self.gammas.copy_(moved.clamp(self.low, self.high))
        self.edges.copy_(edges)
