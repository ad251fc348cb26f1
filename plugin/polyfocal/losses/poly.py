"""The PolyLoss family."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses import functional
from polyfocal.losses.base import ALPHA, EPSILON, GAMMA, ClassificationLoss, Range
from polyfocal.losses.functional import PerClass
from polyfocal.losses.quality import poly1_focal_of_probabilities


class Poly1FocalLoss(ClassificationLoss):
    """Poly-1 focal loss, :func:`polyfocal.losses.functional.poly1_focal_loss`.

    Args:
        epsilon: >= -1. It has no default: the best value depends on the task, which is the
            paper's own finding.
        gamma: >= 0.
        alpha: in [0, 1], one number or one a class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
        activated: the head gives probabilities, as TOODHead does to its initial loss:
            :func:`polyfocal.losses.quality.poly1_focal_of_probabilities`. Sigmoid form; alpha is
            one number or None.
    """

    def __init__(
        self,
        epsilon: float | None = None,
        gamma: float = 2.0,
        alpha: PerClass | None = 0.25,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
        activated: bool = False,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        if epsilon is None:
            raise UserError(
                "Poly1FocalLoss has no epsilon: write one, >= -1 (0 is the focal loss); the best"
                " value depends on the task"
            )
        functional.check_epsilons([epsilon])
        functional.check_nonnegative("gamma", gamma)
        if activated:
            functional.check_form("focal loss of probabilities", use_sigmoid, True)
        self.epsilon = epsilon
        self.gamma = gamma
        self.activated = activated

    def tunable(self) -> dict[str, Range]:
        return {"epsilon": EPSILON, "gamma": GAMMA, "alpha": ALPHA, **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        of: Any = poly1_focal_of_probabilities if self.activated else functional.poly1_focal_loss
        return of(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            gamma=self.gamma,
            alpha=self.alpha,
            **common,
        )


class Poly1CrossEntropyLoss(ClassificationLoss):
    """Poly-1 cross-entropy, :func:`polyfocal.losses.functional.poly1_cross_entropy`.

    Args:
        epsilon: >= -1. The default is the paper's for Mask R-CNN on COCO; it uses +2 on ImageNet.
        use_sigmoid: False for softmax, the paper's; True for Poly-1 on binary cross-entropy.
        label_smoothing: in [0, 1), softmax form.
        reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        epsilon: float = -1.0,
        use_sigmoid: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, None, class_weight, ignore_index)
        functional.check_epsilons([epsilon])
        functional.check_label_smoothing(label_smoothing, use_sigmoid)
        self.epsilon = epsilon
        self.label_smoothing = label_smoothing

    def tunable(self) -> dict[str, Range]:
        return {"epsilon": EPSILON, **super().tunable()}

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.poly1_cross_entropy(
            pred,
            target,
            weight,
            epsilon=self.epsilon,
            label_smoothing=self.label_smoothing,
            **common,
        )


class PolyNLoss(ClassificationLoss):
    """Poly-N, :func:`polyfocal.losses.functional.poly_n_loss`.

    Args:
        epsilons: (epsilon_1, ..., epsilon_N), epsilon_j >= -1/j.
        gamma: >= 0; 0, the default, perturbs cross-entropy, as the paper does.
        alpha: in [0, 1], one number or one a class; None for no such weight.
        use_sigmoid, reduction, loss_weight, class_weight, ignore_index: see
            :class:`~polyfocal.losses.base.ClassificationLoss`.
    """

    def __init__(
        self,
        epsilons: Sequence[float],
        gamma: float = 0.0,
        alpha: PerClass | None = None,
        use_sigmoid: bool | None = None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(use_sigmoid, reduction, loss_weight, alpha, class_weight, ignore_index)
        functional.check_epsilons(epsilons, "epsilons")
        functional.check_nonnegative("gamma", gamma)
        self.epsilons = tuple(epsilons)
        self.gamma = gamma

    def tunable(self) -> dict[str, Range]:
        return {
            **{
                f"epsilons.{j}": Range(-1.0 / (j + 1), EPSILON.high)
                for j in range(len(self.epsilons))
            },
            "gamma": GAMMA,
            "alpha": ALPHA,
            **super().tunable(),
        }

    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        return functional.poly_n_loss(
            pred,
            target,
            weight,
            epsilons=self.epsilons,
            gamma=self.gamma,
            alpha=self.alpha,
            **common,
        )
