"""Focal loss with a gamma for each range of p_t."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.base import ClassificationLoss
from polyfocal.losses.rows import labels_only, per_class, positives, prepare, weighed
from polyfocal.losses.settings import (
    ALPHA,
    Common,
    Number,
    PerClass,
    Setting,
    Shared,
    Unpack,
    loss_function,
)
from polyfocal.ops.poly_focal import at_class, compute_dtype, softmax_margin


@dataclass(frozen=True)
class Steps(Setting):
    """A list of finite numbers; edges are ascending probabilities."""

    edges: bool = False

    def checked(self, name: str, value: Any, owner: str) -> Any:
        if isinstance(value, Tensor):
            return value  # a module's own, which keeps them in order
        given = value.tolist() if hasattr(value, "tolist") else value
        each = Number(high=1.0) if self.edges else Number(low=-float("inf"))
        try:
            numbers = [each.checked(name, number, owner) for number in given]
        except (TypeError, UserError):
            numbers = None
        if numbers is None or (
            self.edges and numbers != sorted(numbers, key=lambda number: number or 0.0)
        ):
            what = "ascending probabilities" if self.edges else "finite numbers, one per step"
            raise UserError(f"{name}={value}: expected {what}")
        return tuple(numbers)


def check_steps(edges: Sequence[float] | Tensor, gammas: Sequence[float] | Tensor) -> None:
    """Raises UserError unless there is one more gamma than edges."""
    if len(gammas) != len(edges) + 1:
        raise UserError(f"gammas={gammas}: expected {len(edges) + 1} finite numbers, one per step")


@loss_function(edges=Steps(edges=True), gammas=Steps(), alpha=ALPHA)
def stepped_focal_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    edges: Sequence[float] | Tensor,
    gammas: Sequence[float] | Tensor,
    use_sigmoid: bool,
    alpha: PerClass | None = None,
    **common: Unpack[Common],
) -> Tensor:
    r"""Focal loss whose gamma is a step function of p_t.

    .. math::
        L = -\alpha_t (1 - p_t)^{\gamma(p_t)} \log p_t \;(\gamma \ge 0), \qquad
        L = -\alpha_t (1 + p_t)^{|\gamma(p_t)|} \log p_t \;(\gamma < 0)

    gamma is gammas[i] where edges[i - 1] <= p_t < edges[i], and is a constant for the gradient.
    ``edges=(0.2, 0.5), gammas=(5, 3, 3)`` is FLSD-53; AdaFocal chooses both while it trains.

    Args:
        logits, target, weight, class_weight, ignore_index, reduction, avg_factor: see
            :mod:`polyfocal.losses.functional`; integer labels.
        edges: E ascending probabilities.
        gammas: E + 1 finite numbers.
        use_sigmoid, alpha: as in :func:`~polyfocal.losses.focal.focal_loss`.

    Source: Mukhoti et al., Calibrating Deep Neural Networks using Focal Loss (2020), FLSD-53;
        Ghosh et al., AdaFocal (2022), for gammas below 0.
    """
    check_steps(edges, gammas)
    rows = prepare(logits, target, weight, use_sigmoid, **common)
    labels_only(rows, "the stepped focal loss")
    x = rows.logits.to(compute_dtype(logits))
    of_alpha = per_class("alpha", alpha, x, x.shape[1], x.dtype)
    alpha_t: Tensor | float = 1.0
    if not use_sigmoid:
        z = softmax_margin(x, rows.target)
        if of_alpha is not None:
            alpha_t = at_class(of_alpha, rows.target)
    else:
        positive = positives(rows.target, x.shape[1])
        z = torch.where(positive, x, -x)
        if of_alpha is not None:
            alpha_t = torch.where(positive, of_alpha, 1.0 - of_alpha)
    log_pt, log_miss = F.logsigmoid(z), F.logsigmoid(-z)
    step = torch.as_tensor(edges, dtype=z.dtype, device=z.device)
    table = torch.as_tensor(gammas, dtype=z.dtype, device=z.device)
    gamma = table[torch.bucketize(torch.exp(log_pt.detach()), step, right=True)]
    # The side of torch.where that is not taken must be finite too, for its gradient.
    modulator = torch.where(
        gamma < 0,
        torch.exp(gamma.abs() * torch.log1p(torch.exp(log_pt))),
        torch.exp(gamma.clamp_min(0) * log_miss),
    )
    return weighed(rows, -alpha_t * modulator * log_pt)


class SampleDependentFocalLoss(ClassificationLoss):
    """Focal loss with a gamma for each range of p_t; the defaults are FLSD-53.

    See :func:`polyfocal.losses.functional.stepped_focal_loss`.

    Args:
        gammas: one more than edges.
        edges: ascending, in [0, 1].
        alpha: in [0, 1], one number or one per class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    function = stepped_focal_loss
    soft_targets = False
    monotone = False  # the loss jumps at an edge

    def __init__(
        self,
        gammas: Sequence[float] = (5.0, 3.0, 3.0),
        edges: Sequence[float] = (0.2, 0.5),
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(use_sigmoid, gammas=gammas, edges=edges, alpha=alpha, **shared)
        check_steps(self.edges, self.gammas)
