"""Losses that take out of the training what a bias model knows already."""

from collections.abc import Sequence
from typing import Any, ClassVar, Optional, Union

from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import ALPHA, GAMMA, LOSS_WEIGHT, Range, ScheduledLoss
from polyfocal.losses.bias import BiasSource
from polyfocal.losses.functional import PerClass


class DebiasingLoss(ScheduledLoss):
    """What the debiasing losses share: the bias model's scores and their annealing.

    ``loss(..., bias_logits=b)`` gives the scores by hand; else they come from ``bias``.

    Args:
        bias: a :class:`~polyfocal.losses.bias.BiasSource`; from a config, its dictionary.
        bias_weight: of the bias model's own cross-entropy, added where it is trained too, >= 0.
        anneal_to: theta goes from 1 to this, in [0, 1], in a straight line over the training:
            the bias counts less and less. 1 for no annealing; 0.8 is the published setting.
        use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    _inputs: ClassVar[tuple[str, ...]] = ("bias_logits",)

    def __init__(
        self,
        use_sigmoid: bool | None,
        bias: BiasSource | None,
        bias_weight: float,
        anneal_to: float,
        reduction: str,
        loss_weight: float,
        alpha: PerClass | None,
        class_weight: Sequence[float] | Tensor | None,
        ignore_index: int | None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        functional.check_nonnegative("bias_weight", bias_weight)
        if not (isinstance(anneal_to, int | float) and 0 <= anneal_to <= 1):
            raise UserError(f"anneal_to={anneal_to}: expected a number in [0, 1]")
        self.bias = _checked_source(self, "bias", bias)
        self.bias_weight = bias_weight
        self.anneal_to = anneal_to

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        ignore_index: Optional[int] = None,
        bias_logits: Optional[Tensor] = None,
    ) -> Tensor:
        """As in every loss, with the bias model's logits, which else come from ``bias``."""
        return self._weighed(
            pred,
            target,
            weight,
            avg_factor,
            reduction_override,
            ignore_index,
            (bias_logits,),
        )

    def tunable(self) -> dict[str, Range]:
        return {
            "anneal_to": Range(0.5, 1.0),
            "bias_weight": LOSS_WEIGHT,
            **super().tunable(),
        }

    def theta(self) -> float:
        """The annealing exponent now."""
        if self.anneal_to == 1:
            return 1.0
        return 1.0 - (1.0 - self.anneal_to) * min(max(self.progress(), 0.0), 1.0)

    def _common(self, pred: Tensor, common: dict[str, Any]) -> dict[str, Any]:
        """The keywords that the functions of all these losses have."""
        given = common.pop("bias_logits")
        return {
            "bias_logits": self._asked("bias", pred) if given is None else given,
            "bias_weight": self.bias_weight,
            "theta": self.theta(),
            **common,
        }

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


def _checked_source(loss: DebiasingLoss, name: str, source: object) -> BiasSource | None:
    if source is not None and not isinstance(source, BiasSource):
        raise UserError(
            f"{type(loss).__name__} has {name}={source!r}: expected a BiasSource (ClassPriors,"
            " StoredScores, BiasHead) or, in a config, the dictionary of one"
        )
    return source


class DebiasedFocalLoss(DebiasingLoss):
    """Debiased focal loss, :func:`polyfocal.losses.functional.debiased_focal_loss`.

    Args:
        gamma: >= 0.
        alpha: in [0, 1], one number or one a class; None for no such weight.
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`DebiasingLoss`.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: PerClass | None = None,
        bias: BiasSource | None = None,
        bias_weight: float = 1.0,
        anneal_to: float = 1.0,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            use_sigmoid,
            bias,
            bias_weight,
            anneal_to,
            reduction,
            loss_weight,
            alpha,
            class_weight,
            ignore_index,
        )
        functional.check_nonnegative("gamma", gamma)
        self.gamma = gamma

    def tunable(self) -> dict[str, Range]:
        return {"gamma": GAMMA, "alpha": ALPHA, **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.debiased_focal_loss(
            pred, target, weight, gamma=self.gamma, alpha=self.alpha, **self._common(pred, common)
        )


class ProductOfExpertsLoss(DebiasingLoss):
    """Product of experts, :func:`polyfocal.losses.functional.product_of_experts`.

    Args:
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`DebiasingLoss`.
    """

    def __init__(
        self,
        bias: BiasSource | None = None,
        bias_weight: float = 1.0,
        anneal_to: float = 1.0,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            use_sigmoid,
            bias,
            bias_weight,
            anneal_to,
            reduction,
            loss_weight,
            None,
            class_weight,
            ignore_index,
        )

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.product_of_experts(pred, target, weight, **self._common(pred, common))


class ReweightedCrossEntropyLoss(DebiasingLoss):
    """Example reweighting, :func:`polyfocal.losses.functional.reweighted_cross_entropy`.

    Args:
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`DebiasingLoss`.
    """

    def __init__(
        self,
        bias: BiasSource | None = None,
        bias_weight: float = 1.0,
        anneal_to: float = 1.0,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            use_sigmoid,
            bias,
            bias_weight,
            anneal_to,
            reduction,
            loss_weight,
            None,
            class_weight,
            ignore_index,
        )

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.reweighted_cross_entropy(
            pred, target, weight, **self._common(pred, common)
        )


class ConfidenceRegularizationLoss(DebiasingLoss):
    """Confidence regularisation, :func:`polyfocal.losses.functional.confidence_regularization`.

    ``loss(..., teacher_logits=t)`` gives the teacher's scores by hand; else they come from
    ``teacher``.

    Args:
        teacher: a source of the teacher's scores, as ``bias`` is of the bias model's.
        bias, bias_weight, anneal_to, use_sigmoid, reduction, loss_weight, class_weight,
            ignore_index: see :class:`DebiasingLoss`.
    """

    _inputs = ("bias_logits", "teacher_logits")

    def __init__(
        self,
        teacher: BiasSource | None = None,
        bias: BiasSource | None = None,
        bias_weight: float = 1.0,
        anneal_to: float = 1.0,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            use_sigmoid,
            bias,
            bias_weight,
            anneal_to,
            reduction,
            loss_weight,
            None,
            class_weight,
            ignore_index,
        )
        self.teacher = _checked_source(self, "teacher", teacher)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        ignore_index: Optional[int] = None,
        bias_logits: Optional[Tensor] = None,
        teacher_logits: Optional[Tensor] = None,
    ) -> Tensor:
        """As in every loss, with the bias model's and the teacher's logits."""
        return self._weighed(
            pred,
            target,
            weight,
            avg_factor,
            reduction_override,
            ignore_index,
            (bias_logits, teacher_logits),
        )

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        given = common.pop("teacher_logits")
        return functional.confidence_regularization(
            pred,
            target,
            weight,
            teacher_logits=self._asked("teacher", pred) if given is None else given,
            **self._common(pred, common),
        )
