"""Noised top-K losses."""

import math
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import ClassificationLoss, Range


class NoisedTopKLoss(ClassificationLoss):
    """Noised top-K hinge loss, :func:`polyfocal.losses.functional.noised_topk_loss`.

    ``loss(..., generator=g)`` draws the noise from g.

    Args:
        k: K >= 1; the logits need more than K columns.
        epsilon: of the noise, >= 0. It has no default: the paper's differ by data set.
        num_samples: B >= 1, noised copies of each row.
        seed: makes the noise of the n-th call that of (seed, n), whatever else is drawn; None for
            torch's own generator.
        use_sigmoid: False; the loss ranks the classes against each other.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    margin = 1.0
    _inputs = ("generator", "noise")

    def __init__(
        self,
        k: int,
        epsilon: float,
        num_samples: int = 5,
        seed: int | None = None,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, None, class_weight, ignore_index)
        functional.check_topk(k, epsilon, num_samples, 1.0)
        functional.check_form("noised top-K loss", use_sigmoid, False)
        if seed is not None and not isinstance(seed, int):
            raise UserError(f"seed={seed}: expected a whole number, or None for torch's generator")
        self.k = k
        self.epsilon = epsilon
        self.num_samples = num_samples
        self.seed = seed
        self._calls = 0

    def _drawn(self, pred: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """The keywords with a generator of this call where there is a seed."""
        if self.seed is None or inputs["generator"] is not None or inputs["noise"] is not None:
            return inputs
        # A generator cannot be copied with the module (EMA); its seed and a count can.
        generator = torch.Generator(pred.device).manual_seed(self.seed * 1_000_003 + self._calls)
        self._calls += 1
        return {**inputs, "generator": generator}

    def tunable(self) -> dict[str, Range]:
        return {
            "epsilon": Range(0.01, 2.0, log=True),  # the paper's: 0.01, 0.2 and 1
            **super().tunable(),
        }

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
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

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.noised_topk_loss(
            pred,
            target,
            weight,
            k=self.k,
            epsilon=self.epsilon,
            num_samples=self.num_samples,
            **self._drawn(pred, common),
        )

    def activation(self, pred: Tensor) -> Tensor:
        r"""Scores (..., C) in [0, 1] that can be compared between rows: softmax of a stretched row.

        .. math:: \mathrm{softmax}(s \log C / m)

        with m the (largest) margin. The loss fixes differences within a row only, as softmax does,
        but stops at a difference of m, where a plain softmax over many classes is still almost
        flat. With the factor log(C) / m the label of a row that just meets the margin over all the
        other classes gets about 1/2, whatever C is.
        """
        pred = pred.float()
        return torch.softmax(pred * (math.log(max(pred.shape[-1], 2)) / self.margin), dim=-1)


class ImbalancedNoisedTopKLoss(NoisedTopKLoss):
    """Noised top-K hinge loss with margins by class frequency, for long tails.

    See :func:`polyfocal.losses.functional.imbalanced_noised_topk_loss` and
    :func:`~polyfocal.losses.functional.topk_margins`.

    Args:
        k, epsilon, num_samples, seed, use_sigmoid: as in :class:`NoisedTopKLoss`.
        class_counts: training samples of each class, >= 0; for logits with a background column,
            those of the other classes. From a config it may also be the path of a COCO annotation
            file; ``polyfocal.mmengine.class_counts`` counts a data set.
        max_margin: margin of the rarest class, > 0.
        scale: factor inside the hinge, > 0. 50, the default of the paper's code, is for a
            classifier of normalised weights on normalised features; with another one write 1.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    margins: Tensor

    def __init__(
        self,
        k: int,
        epsilon: float,
        class_counts: Sequence[float] | Tensor,
        max_margin: float,
        scale: float = 50.0,
        num_samples: int = 5,
        seed: int | None = None,
        use_sigmoid: bool = False,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            k,
            epsilon,
            num_samples,
            seed,
            use_sigmoid,
            reduction,
            loss_weight,
            class_weight,
            ignore_index,
        )
        functional.check_topk(k, epsilon, num_samples, scale)
        margins = functional.topk_margins(class_counts, max_margin)
        self.register_buffer("margins", margins, persistent=False)
        self.margin = float(max_margin)
        self.scale = scale

    def tunable(self) -> dict[str, Range]:
        return {
            "max_margin": Range(0.1, 0.6),  # the paper's: 0.2 and 0.3
            "scale": Range(1.0, 100.0, log=True),
            **super().tunable(),
        }

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.imbalanced_noised_topk_loss(
            pred,
            target,
            weight,
            k=self.k,
            epsilon=self.epsilon,
            margins=self.margins,
            scale=self.scale,
            num_samples=self.num_samples,
            **self._drawn(pred, common),
        )
