"""What the debiasing losses share: they take out of the training what a bias model knows."""

from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.base import ScheduledLoss
from polyfocal.losses.bias import BiasSource
from polyfocal.losses.rows import Rows, as_rows, positives, weighed_poly, without_ignored
from polyfocal.losses.settings import (
    LOSS_WEIGHT,
    Number,
    Range,
    Setting,
    Shared,
)
from polyfocal.ops import PolyFocal
from polyfocal.ops.poly_focal import compute_dtype, softmax_margin

THETA = Number(high=1.0)
SETTINGS: dict[str, Setting] = {"bias_weight": LOSS_WEIGHT, "theta": THETA}


class BiasShared(Shared, total=False):
    """Keywords of every debiasing module; see :class:`DebiasingLoss`."""

    bias: Any
    bias_weight: float
    anneal_to: float


def bias_rows(rows: Rows, logits: Tensor, bias: Tensor, name: str = "bias_logits") -> Tensor:
    """The logits of a bias model, in the dtype of the loss, 0 in the rows that are ignored.

    Raises:
        UserError: another shape than that of the logits, or no floating point.
    """
    if bias.shape != logits.shape or not bias.is_floating_point():
        raise UserError(
            f"{name} {tuple(bias.shape)} {bias.dtype} for logits {tuple(logits.shape)}: expected"
            " floating point of the same shape"
        )
    if rows.places is not None:
        bias = as_rows(bias)
    return without_ignored(bias.to(compute_dtype(logits)), rows.keep)


def annealed(theta: float, log_probabilities: Tensor) -> Tensor:
    """Theta times the logarithms; 0 at theta = 0 for -inf too."""
    return log_probabilities * theta if theta > 0 else torch.zeros_like(log_probabilities)


def bias_miss(rows: Rows, bias: Tensor) -> Tensor:
    """1 - p^B_t: (N, C) in the sigmoid form, else (N,)."""
    target = rows.target
    if not rows.use_sigmoid:
        # A class that the bias model excludes has -inf; it becomes the lowest number.
        bias = bias.clamp_min(torch.finfo(bias.dtype).min / 4)
        if not rows.soft:
            return torch.sigmoid(-softmax_margin(bias, target))
        return 1.0 - (target * torch.softmax(bias, dim=1)).sum(dim=1)
    if rows.soft:
        p = torch.sigmoid(bias)
        return 1.0 - (target * p + (1.0 - target) * (1.0 - p))
    return torch.sigmoid(torch.where(positives(target, bias.shape[1]), -bias, bias))


def bias_training(rows: Rows, bias_weight: float, *models: Tensor) -> Tensor | float:
    """The cross-entropies of the bias models that are trained together with the main one."""
    if bias_weight == 0:
        return 0.0
    return sum(
        bias_weight * weighed_poly(rows, PolyFocal(), logits=bias)
        for bias in models
        if bias.requires_grad
    )


class DebiasingLoss(ScheduledLoss, table=False):
    """What the debiasing losses share: the bias model's scores and their annealing.

    ``loss(..., bias_logits=b)`` gives the scores by hand; otherwise they come from ``bias``.

    Args:
        use_sigmoid: see :class:`~polyfocal.losses.base.ClassificationLoss`.
        bias: a :class:`~polyfocal.losses.bias.BiasSource`; from a config, its dictionary.
        bias_weight: weight of the bias model's own cross-entropy, >= 0. It is added if the bias
            model is trained too.
        anneal_to: theta goes from 1 to this value, in [0, 1], in a straight line over the
            training: the bias counts less and less. 1 for no annealing; 0.8 is published.
        settings: those of the subclass, and of
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    settings: ClassVar[dict[str, Any]] = {
        "bias_weight": LOSS_WEIGHT,
        "anneal_to": Number(Range(0.5, 1.0), high=1.0),
    }
    _inputs: ClassVar[tuple[str, ...]] = ("bias_logits",)
    bias_weight: float
    anneal_to: float

    def __init__(
        self,
        use_sigmoid: bool | None,
        bias: Any = None,
        bias_weight: float = 1.0,
        anneal_to: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(use_sigmoid, bias_weight=bias_weight, anneal_to=anneal_to, **settings)
        self.bias = checked_source(self, "bias", bias)

    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        ignore_index: Optional[int] = None,
        bias_logits: Optional[Tensor] = None,
    ) -> Tensor:
        """As in every loss, with the bias model's logits; without them ``bias`` gives them."""
        return self._weighed(
            pred, target, weight, avg_factor, reduction_override, ignore_index, (bias_logits,)
        )

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        for name in self._inputs:
            if common[name] is None:
                common[name] = self._asked(name.removesuffix("_logits"), pred)
        return super().compute(pred, target, weight, theta=self.theta(), **common)

    def theta(self) -> float:
        """The annealing exponent now."""
        if self.anneal_to == 1:
            return 1.0
        return 1.0 - (1.0 - self.anneal_to) * min(max(self.now(), 0.0), 1.0)

    def _asked(self, name: str, pred: Tensor) -> Tensor:
        source: BiasSource | None = getattr(self, name)
        if source is None:
            what = type(self).__name__
            raise UserError(
                f"{what} has no {name} model's scores: write {name}=dict(type="
                "'polyfocal.ClassPriors' or another source, ...), or call it with"
                f" {name}_logits="
            )
        return source(pred, self.use_sigmoid)


def checked_source(loss: DebiasingLoss, name: str, source: object) -> BiasSource | None:
    """The source of a model's scores.

    Raises:
        UserError: ``source`` is no such source.
    """
    if source is not None and not isinstance(source, BiasSource):
        raise UserError(
            f"{type(loss).__name__} has {name}={source!r}: expected a BiasSource (ClassPriors,"
            " StoredScores, BiasHead) or, in a config, the dictionary of one"
        )
    return source
