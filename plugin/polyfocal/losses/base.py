"""The module behind every loss: the call contract that MMDetection's heads use."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor, nn

from polyfocal.errors import UserError
from polyfocal.losses.functional import (
    PerClass,
    check_alpha,
    check_class_weight,
    check_nonnegative,
)
from polyfocal.losses.reduction import check_reduction


@dataclass(frozen=True)
class Range:
    """The values of a setting that are worth a search.

    Attributes:
        low, high: Both are among them.
        log: Whether factors count and not differences.
    """

    low: float
    high: float
    log: bool = False


# Where the papers looked: gamma in RetinaNet's table 1b, alpha where its table 1a has an AP at all.
# epsilon begins at PolyLoss's bound, and its best ones, -1 and 2, lie well inside.
EPSILON = Range(-1.0, 5.0)
GAMMA = Range(0.0, 5.0)
ALPHA = Range(0.1, 0.9)
# No paper searches it. Two doublings either way change its share beside the loss of the boxes.
LOSS_WEIGHT = Range(0.25, 4.0, log=True)


class ClassificationLoss(nn.Module, ABC):
    """A loss of logits and targets: ``loss(pred, target, weight, avg_factor)``.

    A subclass gives its hyper-parameters to its function in :meth:`compute`.

    Args:
        use_sigmoid: one binary problem a class, or one softmax over the classes. Heads choose
            their number of outputs and their activation by it, and MMDetection's dense heads
            read it from the config and not from the loss, so it must be written there.
        reduction: 'none', 'mean' or 'sum'.
        loss_weight: factor on the result, >= 0.
        alpha, class_weight, ignore_index: see :mod:`polyfocal.losses.functional`.

    Raises:
        UserError: a value out of its range, or no ``use_sigmoid``.
        TypeError: a keyword that the loss does not have.
    """

    alpha: Optional[Union[Tensor, float]]
    class_weight: Optional[Tensor]

    def __new__(cls, *args: Any, **kwargs: Any) -> "ClassificationLoss":
        """Refuses a misspelt keyword of a config with the list of the right ones."""
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no keyword {name!r}: it takes {', '.join(known)}"
                )
        return super().__new__(cls)

    def __init__(
        self,
        use_sigmoid: bool | None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        alpha: PerClass | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(use_sigmoid, bool):
            raise UserError(
                f"{type(self).__name__} has use_sigmoid={use_sigmoid}: write use_sigmoid=True (one"
                " binary problem a class, as in dense heads) or use_sigmoid=False (softmax) beside"
                " its type, because heads read that key"
            )
        check_reduction(reduction)
        check_nonnegative("loss_weight", loss_weight)
        check_alpha(alpha)
        check_class_weight(class_weight)
        self.use_sigmoid = use_sigmoid
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        # Not persistent: a checkpoint trained with this loss loads in a model that has another.
        self._per_class("class_weight", class_weight)
        self._per_class("alpha", alpha)

    def _per_class(self, name: str, value: PerClass | None) -> None:
        if value is None or isinstance(value, int | float):
            setattr(self, name, value)
        else:
            value = torch.as_tensor(value, dtype=torch.float32)
            self.register_buffer(name, value, persistent=False)

    def tunable(self) -> dict[str, Range]:
        """The settings that a search may change, by keyword; ``epsilons.0`` is an entry of one."""
        return {"loss_weight": LOSS_WEIGHT}

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor's keywords."""
        settings = {
            k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"
        }
        return ", ".join(f"{name}={value}" for name, value in settings.items())

    @abstractmethod
    def compute(self, pred: Tensor, target: Tensor, weight: Tensor | None, **common: Any) -> Tensor:
        """The loss function of this module with its hyper-parameters.

        Args:
            pred, target, weight: as in :meth:`forward`.
            common: ``use_sigmoid``, ``class_weight``, ``ignore_index``, ``reduction`` and
                ``avg_factor``, to hand on; and what else :meth:`forward` was given.
        """

    # Written so that torch.jit.script of torch 2.1 can read it: every argument by name, no ** and
    # no | in a type, here and in the overrides.
    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
        ignore_index: Optional[int] = None,
    ) -> Tensor:
        """The weighted and reduced loss times ``loss_weight``.

        A model that holds or calls the loss can be scripted by ``torch.jit.script``; the scripted
        model serves without the loss, which it does not compute.

        Args:
            pred: logits, (N, C) or (N, K).
            target: labels (N,) or soft targets of the logits' shape; what a loss says beside.
            weight, avg_factor: see :mod:`polyfocal.losses.reduction`.
            reduction_override: takes the place of ``reduction`` for this call.
            ignore_index: takes the place of the module's for this call.
        """
        return self._weighed(pred, target, weight, avg_factor, reduction_override, ignore_index, ())

    # What else the loss is computed from: the names of the last argument of _weighed.
    _inputs: ClassVar[tuple[str, ...]] = ()

    @torch.jit.unused
    def _weighed(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor],
        avg_factor: Optional[Union[Tensor, float]],
        reduction_override: Optional[str],
        ignore_index: Optional[int],
        inputs: Any,
    ) -> Tensor:
        loss = self.compute(
            pred,
            target,
            weight,
            use_sigmoid=self.use_sigmoid,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index if ignore_index is None else ignore_index,
            reduction=self.reduction if reduction_override is None else reduction_override,
            avg_factor=avg_factor,
            **{name: inputs[i] for i, name in enumerate(self._inputs)},
        )
        return loss if self.loss_weight == 1.0 else self.loss_weight * loss


class ScheduledLoss(ClassificationLoss):
    """A loss that changes while the model is trained.

    It needs to know how much of the training is done. An adapter of a framework reads that from
    the framework by overriding :meth:`progress`; in a training loop of one's own,
    :meth:`set_progress` says it.
    """

    _progress: float | None = None

    def set_progress(self, progress: float) -> None:
        """Says what part of the training is done, in [0, 1]; values outside are clamped."""
        self._progress = float(progress)

    def progress(self) -> float:
        """The part of the training that is done.

        Raises:
            UserError: nobody has said it.
        """
        if self._progress is None:
            raise UserError(
                f"{type(self).__name__} does not know the training's progress: call"
                " set_progress(iteration / max(1, max_iterations - 1)) before each step, train with"
                " MMEngine's Runner, which publishes it, or register"
                " polyfocal.detectron2.ProgressHook() with Detectron2's trainer"
            )
        return self._progress
