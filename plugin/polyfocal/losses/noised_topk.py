"""Noised top-K hinge loss."""

import math
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import Rows, labels_only, prepare, weighed
from polyfocal.losses.settings import (
    Common,
    Form,
    Number,
    Range,
    Setting,
    Shared,
    Unpack,
    Whole,
    loss_function,
)
from polyfocal.ops import noised_gap
from polyfocal.ops.poly_focal import compute_dtype

SETTINGS: dict[str, Setting] = {
    "k": Whole(low=1),
    "epsilon": Number(Range(0.01, 2.0, log=True)),  # the paper's: 0.01, 0.2 and 1
    "num_samples": Whole(low=1),
    "use_sigmoid": Form(only=False, what="noised top-K loss"),
}


@loss_function(**SETTINGS)
def noised_topk_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int,
    epsilon: float,
    num_samples: int = 5,
    use_sigmoid: bool = False,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    **common: Unpack[Common],
) -> Tensor:
    r"""Noised top-K hinge loss.

    .. math::
        L = \max(0,\, 1 + \mathrm{top}_{K+1,\epsilon}(s) - s_y), \qquad
        \mathrm{top}_{k,\epsilon}(s) = \frac1B \sum_b (s + \epsilon Z_b)_{[k]}, \; Z_b \sim N(0, I)

    with (.)_[k] the k-th largest of all classes, y among them. The gradient is that of a perturbed
    optimizer: for top it is the mean, over the B copies, of the one-hot vector of the class at
    rank K + 1. No tensor of the size N x C x B is made.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`; softmax form's shapes with integer labels, more
            than k columns.
        k: K >= 1, the label should be among the K largest scores.
        epsilon: strength of the noise, in the unit of the scores, >= 0; 0 is the plain hinge.
        num_samples: B >= 1.
        use_sigmoid: must be False.
        generator: draws the noise, on the logits' device; None for torch's own.
        noise: (N, C, B), instead of drawn noise.

    Source: Garcin et al., Stochastic smoothing of the top-K calibrated hinge loss (2022), the
        balanced loss.
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    return weighed(rows, torch.relu(1.0 + gap(rows, k, epsilon, num_samples, generator, noise)))


def gap(
    rows: Rows,
    k: int,
    epsilon: float,
    num_samples: int,
    generator: torch.Generator | None,
    noise: Tensor | None,
) -> Tensor:
    """(N,) top_{K+1, epsilon}(s) - s_y; checks what only these losses need of their input."""
    labels_only(rows, "the noised top-K loss")
    columns = rows.logits.shape[1]
    if columns <= k:
        raise UserError(
            f"k={k} with logits of {columns} columns: the noised top-K loss needs at least"
            f" {k + 1}, since it compares with the class at rank k + 1"
        )
    expected = (*rows.logits.shape, num_samples)
    if noise is not None and noise.shape != expected:
        raise UserError(f"noise has shape {tuple(noise.shape)}: expected {expected}")
    scores = rows.logits.to(compute_dtype(rows.logits))
    return noised_gap(scores, rows.target, k + 1, epsilon, num_samples, generator, noise)


class NoisedTopKLoss(ClassificationLoss):
    """Noised top-K hinge loss, :func:`polyfocal.losses.functional.noised_topk_loss`.

    ``loss(..., generator=g)`` draws the noise from g.

    Args:
        k: K >= 1; the logits need more than K columns.
        epsilon: strength of the noise, >= 0. It has no default: the paper's values differ by data
            set.
        num_samples: B >= 1, noised copies of each row.
        seed: the n-th call draws its noise from (seed, n), whatever else is drawn; None for
            torch's own generator.
        use_sigmoid: False; the loss ranks the classes against each other.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function: ClassVar[Any] = noised_topk_loss
    settings: ClassVar[dict[str, Any]] = {
        "seed": Whole(optional=True, else_=", or None for torch's generator")
    }
    soft_targets = False
    margin = 1.0
    seed: Optional[int]
    _inputs = ("generator", "noise")

    def __init__(
        self,
        k: int,
        epsilon: float,
        num_samples: int = 5,
        seed: int | None = None,
        use_sigmoid: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(
            use_sigmoid, k=k, epsilon=epsilon, num_samples=num_samples, seed=seed, **shared
        )
        self._calls = 0

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        ignore_index: Optional[int] = None,
        generator: Any = None,
        noise: Optional[Tensor] = None,
    ) -> Tensor:
        """As in every loss, with a generator or the noise itself."""
        return self._weighed(
            pred,
            target,
            weight,
            avg_factor,
            reduction_override,
            ignore_index,
            (generator, noise),
        )

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        if self.seed is not None and common["generator"] is None and common["noise"] is None:
            # A generator cannot be copied with the module (EMA); its seed and a count can.
            seed = self.seed * 1_000_003 + self._calls
            common["generator"] = torch.Generator(pred.device).manual_seed(seed)
            self._calls += 1
        return super().compute(pred, target, weight, **common)

    def activation(self, pred: Tensor) -> Tensor:
        r"""Scores (..., C) in [0, 1] that can be compared between rows: softmax of a stretched row.

        .. math:: \mathrm{softmax}(s \log C / m)

        with m the (largest) margin. Like softmax, the loss depends only on differences within a
        row. But it stops at a difference of m, where a plain softmax over many classes is still
        almost flat. With the factor log(C) / m, the label of a row that just meets the margin over
        all the other classes gets about 1/2, whatever C is.
        """
        pred = pred.float()
        return torch.softmax(pred * (math.log(max(pred.shape[-1], 2)) / self.margin), dim=-1)
