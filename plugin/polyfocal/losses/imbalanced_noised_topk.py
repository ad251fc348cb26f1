"""Noised top-K hinge loss with margins by class frequency."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.noised_topk import SETTINGS, NoisedTopKLoss, gap
from polyfocal.losses.rows import prepare, weighed
from polyfocal.losses.settings import (
    Common,
    Number,
    Numbers,
    PerClass,
    Range,
    Shared,
    Unpack,
    loss_function,
)
from polyfocal.ops.poly_focal import compute_dtype

_MAX_MARGIN = Number(Range(0.1, 0.6), without="low")  # the paper's: 0.2 and 0.3


@loss_function(
    margins=Numbers(), scale=Number(Range(1.0, 100.0, log=True), without="low"), **SETTINGS
)
def imbalanced_noised_topk_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: int,
    epsilon: float,
    margins: PerClass | None,
    scale: float = 50.0,
    num_samples: int = 5,
    use_sigmoid: bool = False,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    **common: Unpack[Common],
) -> Tensor:
    r"""Noised top-K hinge loss with a margin per class.

    .. math:: L = \max(0,\, S\,(m_y + \mathrm{top}_{K+1,\epsilon}(s) - s_y))

    Args:
        logits, target, weight, k, epsilon, num_samples, use_sigmoid, class_weight, ignore_index,
            reduction, avg_factor, generator, noise: as in
            :func:`~polyfocal.losses.noised_topk.noised_topk_loss`.
        margins: m, one >= 0 per column, see :func:`topk_margins`. With one margin fewer than
            columns, the last column is background; it gets the smallest margin, that of the most
            frequent class. None for 1 everywhere.
        scale: S > 0. 50 is meant for scores that are cosines; for other scores use 1.

    Source: Garcin et al. (2022), the imbalanced loss.
    """
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    over = gap(rows, k, epsilon, num_samples, generator, noise)
    margin: Tensor | float = 1.0
    if margins is not None:
        table = torch.as_tensor(margins, dtype=compute_dtype(logits), device=logits.device)
        margin = of_columns(table, logits.shape[1])[rows.target]
    return weighed(rows, torch.relu(scale * (margin + over)))


def topk_margins(class_counts: PerClass, max_margin: float) -> Tensor:
    r"""Margins of the imbalanced noised top-K loss, :math:`m_y = C / n_y^{1/4}`.

    C is chosen so that the rarest class has ``max_margin``. A class without samples has that
    margin too, and does not count for C.

    Args:
        class_counts: n, samples of each class, >= 0, one of them above 0.
        max_margin: > 0.

    Returns:
        float32, one per class.

    Source: Garcin et al. (2022), after Cao et al., LDAM (2019).
    """
    _MAX_MARGIN.checked("max_margin", max_margin, "topk_margins")
    counts = Numbers(optional=False).checked("class_counts", class_counts, "topk_margins")
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if not (counts > 0).any():
        raise UserError("class_counts: expected one number per class, one of them above 0")
    rarest = counts[counts > 0].min()
    return (max_margin * (rarest / counts.clamp_min(rarest)) ** 0.25).float()


def of_columns(margins: Tensor, columns: int) -> Tensor:
    """(columns,) margins; a last column without one is background, and gets the smallest.

    Raises:
        UserError: there are more or fewer margins.
    """
    if len(margins) == columns - 1:
        margins = torch.cat([margins, margins.amin(dim=0, keepdim=True)])
    if len(margins) != columns:
        raise UserError(
            f"{len(margins)} class counts (margins) for logits of {columns} columns: expected"
            f" {columns}, or {columns - 1} if the last column is background"
        )
    return margins


def rescaled(margins: Tensor, max_margin: float) -> Tensor:
    """Margins of :func:`topk_margins` for another ``max_margin``."""
    return margins * (max_margin / margins.max())


class ImbalancedNoisedTopKLoss(NoisedTopKLoss):
    """Noised top-K hinge loss with margins by class frequency, for long tails.

    See :func:`polyfocal.losses.functional.imbalanced_noised_topk_loss` and
    :func:`~polyfocal.losses.functional.topk_margins`.

    Args:
        k, epsilon, num_samples, seed, use_sigmoid: as in
            :class:`~polyfocal.losses.NoisedTopKLoss`.
        class_counts: training samples of each class, >= 0; for logits with a background column,
            those of the other classes. From a config it may also be the path of a COCO annotation
            file; ``polyfocal.mmengine.class_counts`` counts a data set.
        max_margin: margin of the rarest class, > 0.
        scale: factor inside the hinge, > 0. 50, the default of the paper's code, is for a
            classifier of normalised weights on normalised features; for other classifiers write 1.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function: ClassVar[Any] = imbalanced_noised_topk_loss
    settings: ClassVar[dict[str, Any]] = {"max_margin": _MAX_MARGIN}
    margins: Tensor
    max_margin: float

    def __init__(
        self,
        k: int,
        epsilon: float,
        class_counts: PerClass,
        max_margin: float,
        scale: float = 50.0,
        num_samples: int = 5,
        seed: int | None = None,
        use_sigmoid: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(k, epsilon, num_samples, seed, use_sigmoid, **shared)
        self.scale = scale
        self.max_margin = max_margin
        self.margins = topk_margins(class_counts, self.max_margin)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "max_margin":
            self.margin = float(self.max_margin)
            if "margins" in self._buffers:
                self.margins = rescaled(self.margins, self.max_margin)
