"""The modules behind every loss, and the table that a loss enters by being defined."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from polyfocal._torch import autocast_is_on, looked_up
from polyfocal.errors import UserError
from polyfocal.losses.rows import labels_only, prepare, weighed
from polyfocal.losses.settings import (
    CLASS_WEIGHT,
    LOSS_WEIGHT,
    REDUCTION,
    ExactBuffers,
    Form,
    Range,
    Whole,
    spelled_out,
)
from polyfocal.ops.poly_focal import compute_dtype

# A longer list of numbers is shown by its ends.
_SHOWN = 16


class Table(Mapping[str, "type[Loss]"]):
    """The losses by name, in the order in which they were defined.

    Exports, the registries of the frameworks, the tools and the tests read this table. A class
    whose name is taken is left out, unless the same class is defined anew.
    """

    def __init__(self) -> None:
        self._classes: dict[str, type[Loss]] = {}
        self._told: list[Callable[[type[Loss]], None]] = []

    def __getitem__(self, name: str) -> "type[Loss]":
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def enter(self, cls: "type[Loss]") -> None:
        """Puts a class in the table and tells the followers."""
        there = self._classes.setdefault(cls.__name__, cls)
        if (there.__module__, there.__qualname__) == (cls.__module__, cls.__qualname__):
            self._classes[cls.__name__] = cls
            for told in self._told:
                told(cls)

    def of_logits(self) -> list[str]:
        """Names of the losses of logits and labels, in alphabetical order."""
        return sorted(name for name, cls in self.items() if issubclass(cls, ClassificationLoss))

    def build(self, name: str, settings: Mapping[str, Any]) -> "Loss":
        """A loss from its name, with or without ``polyfocal.`` in front, and its keywords.

        Raises:
            UserError: there is no such loss, or a keyword or a value is wrong.
        """
        cls = self.get(name.removeprefix("polyfocal."))
        if cls is None:
            raise UserError(f"there is no loss {name!r}: expected one of {', '.join(sorted(self))}")
        try:
            return cls(**settings)
        except TypeError as error:  # a keyword too many or too few, a list for a number
            raise UserError(f"{name} does not take these settings: {error}") from None

    def follow(self, told: "Callable[[type[Loss]], None]") -> None:
        """Calls ``told`` with every loss in the table, and with every later one."""
        self._told.append(told)
        for cls in list(self._classes.values()):
            told(cls)


LOSSES = Table()


class Loss(ExactBuffers):
    """A loss that is called as MMDetection calls one: ``loss(pred, target, weight, avg_factor)``.

    A subclass enters :data:`LOSSES` by being defined, unless it is defined with ``table=False``.

    Attributes:
        settings: what each setting may be. A subclass names its own settings; it inherits the
            others and those of its ``function``; None takes a setting out. A setting is checked
            whenever it is set.
        function: the loss function of the module, made by
            :func:`~polyfocal.losses.settings.loss_function`, if it has one.
        monotone: whether the loss of an entry falls as the probability of its target grows.

    Args:
        reduction: 'none', 'mean' or 'sum'.
        loss_weight: factor on the result, >= 0.
        settings: those of the subclass, by keyword.

    Raises:
        UserError: a value that a setting may not have.
        TypeError: a keyword that the loss does not have.
    """

    settings: ClassVar[dict[str, Any]] = {"reduction": REDUCTION, "loss_weight": LOSS_WEIGHT}
    function: ClassVar[Any] = None
    monotone: ClassVar[bool] = True
    _arguments: ClassVar[tuple[str, ...]] = ()
    _unchecked: ClassVar[Any] = None

    reduction: str
    loss_weight: float

    if TYPE_CHECKING:  # the settings

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, table: bool = True, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = vars(cls)
        function = own.get("function")
        new = {**getattr(function, "settings", {}), **own.get("settings", {})}
        inherited: dict[str, Any] = next(
            vars(base)["settings"] for base in cls.__mro__[1:] if "settings" in vars(base)
        )
        every = {**new, **{k: v for k, v in inherited.items() if k not in new}}
        # A setting of the function that the module computes, such as theta, is not the module's.
        cls.settings = {
            k: v for k, v in every.items() if v is not None and not callable(getattr(cls, k, None))
        }
        if function is not None:
            cls._arguments = tuple(name for name in function.settings if name in cls.settings)
            cls._unchecked = staticmethod(function.unchecked)
        if "__init__" in own:
            own["__init__"].__signature__ = spelled_out(own["__init__"])
        if table:
            LOSSES.enter(cls)

    def __init__(self, reduction: str = "mean", loss_weight: float = 1.0, **settings: Any) -> None:
        super().__init__()
        for name in settings:
            if name not in self.settings:
                raise TypeError(
                    f"{type(self).__name__} has no keyword {name!r}: it takes"
                    f" {', '.join(keywords_of(type(self)))}"
                )
        for name, value in {**settings, "reduction": reduction, "loss_weight": loss_weight}.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        setting = type(self).settings.get(name)
        if setting is None:
            super().__setattr__(name, value)
            return
        value = setting.checked(name, value, type(self).__name__)
        for held in (self.__dict__, self._buffers):
            held.pop(name, None)
        if isinstance(value, Tensor):
            # Not persistent: a checkpoint trained with this loss loads in a model with another.
            self.register_buffer(name, value.detach().float(), persistent=False)
        else:
            self.__dict__[name] = value

    def tunable(self) -> dict[str, Range]:
        """The settings that a search may change, by keyword; ``epsilons.0`` is an entry of one."""
        found: dict[str, Range] = {}
        for name, setting in self.settings.items():
            if hasattr(self, name):
                found.update(setting.tunable(name, getattr(self, name)))
        return found

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor's keywords."""
        held = {**self.__dict__, **self._buffers}
        names = dict.fromkeys([*keywords_of(type(self)), *self.settings])
        return ", ".join(f"{name}={_shown(held[name])}" for name in names if name in held)

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        """The weighted and reduced loss, without ``loss_weight``.

        By default :attr:`function` computes it with the settings of the module.

        Args:
            pred, target, weight: as in :meth:`forward`.
            common: what else the function takes: ``reduction``, ``avg_factor``, and what a
                subclass or :meth:`forward` adds.
        """
        own = {name: getattr(self, name) for name in self._arguments}
        own.update(common)
        return self._unchecked(pred, target, weight, **own)

    # What else the loss is computed from: the names of the last argument of _weighed.
    _inputs: ClassVar[tuple[str, ...]] = ()

    # Written so that torch.jit.script of torch 2.1 can read it: every argument by name, no ** and
    # no | in a type, here and in the overrides.
    def forward(
        self,
        pred: Tensor,
        target: Any,
        weight: Optional[Tensor] = None,
        avg_factor: Optional[Union[Tensor, float]] = None,
        reduction_override: Optional[str] = None,
    ) -> Tensor:
        """The weighted and reduced loss times ``loss_weight``.

        A model that holds or calls the loss can be scripted by ``torch.jit.script``; the scripted
        model serves without the loss, which it does not compute.

        Args:
            pred: what the loss is of.
            target: what it should be.
            weight, avg_factor: see :mod:`polyfocal.losses.rows`.
            reduction_override: takes the place of ``reduction`` for this call.
        """
        return self._weighed(pred, target, weight, avg_factor, reduction_override, None, ())

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
        """:meth:`forward`, with the other inputs of a loss."""
        common = self._shared(ignore_index)
        common["reduction"] = self.reduction if reduction_override is None else reduction_override
        common["avg_factor"] = avg_factor
        for i, name in enumerate(self._inputs):
            common[name] = inputs[i]
        device = pred.device.type
        if autocast_is_on(device):
            with torch.autocast(device, enabled=False):
                loss = self.compute(pred, target, weight, **common)
        else:
            loss = self.compute(pred, target, weight, **common)
        return loss if self.loss_weight == 1.0 else self.loss_weight * loss

    def _shared(self, ignore_index: int | None) -> dict[str, Any]:
        return {}


class ClassificationLoss(Loss, table=False):
    """A loss of logits and labels.

    Args:
        use_sigmoid: one binary problem per class, or one softmax over the classes. It decides the
            number of outputs and the activation of a head. MMDetection's dense heads read it from
            the config and not from the loss, so it must be written there.
        reduction: 'none', 'mean' or 'sum'.
        loss_weight: factor on the result, >= 0.
        class_weight, ignore_index: see :mod:`polyfocal.losses.rows`.
        settings: those of the subclass, by keyword.

    Attributes:
        soft_targets: whether the loss takes targets of the logits' shape.
        loss_name: the key under which MMSegmentation's heads add it up and log it.

    Raises:
        UserError: a value out of its range, or no ``use_sigmoid``.
        TypeError: a keyword that the loss does not have.
    """

    settings: ClassVar[dict[str, Any]] = {
        "use_sigmoid": Form(),
        "class_weight": CLASS_WEIGHT,
        "ignore_index": Whole(optional=True),
    }
    soft_targets: ClassVar[bool] = True
    loss_name: ClassVar[str] = "loss_cls"

    use_sigmoid: bool
    class_weight: Optional[Tensor]
    ignore_index: Optional[int]

    def __init__(
        self,
        use_sigmoid: bool | None,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        class_weight: Any = None,
        ignore_index: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            reduction,
            loss_weight,
            use_sigmoid=use_sigmoid,
            class_weight=class_weight,
            ignore_index=ignore_index,
            **settings,
        )

    def compute(self, pred: Tensor, target: Any, weight: Tensor | None, **common: Any) -> Tensor:
        if self.function is not None:
            return super().compute(pred, target, weight, **common)
        rows = prepare(pred, target, weight, **common)
        if not self.soft_targets:
            labels_only(rows, type(self).__name__)
        return weighed(rows, self.unreduced(rows.logits.to(compute_dtype(pred)), rows.target))

    def unreduced(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a class without a :attr:`function`, before it is weighed and reduced.

        Args:
            logits: (N, C), float32 or float64.
            target: labels (N,); or soft targets of the logits' shape, if the loss takes them.

        Returns:
            (N, C) in the sigmoid form, (N,) in the softmax form.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a function, or a method unreduced")

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
            pred: logits, (N, C) or (N, K); (N, C, ...) or (N, K, ...) with a map of labels.
            target: labels (N,), a map of them (N, ...), or soft targets of the logits' shape; what
                a loss says beside.
            weight, avg_factor: see :mod:`polyfocal.losses.rows`.
            reduction_override: takes the place of ``reduction`` for this call.
            ignore_index: takes the place of the module's for this call.
        """
        return self._weighed(pred, target, weight, avg_factor, reduction_override, ignore_index, ())

    def _shared(self, ignore_index: int | None) -> dict[str, Any]:
        return {
            "use_sigmoid": self.use_sigmoid,
            "class_weight": self.class_weight,
            "ignore_index": self.ignore_index if ignore_index is None else ignore_index,
        }


class ScheduledLoss(ClassificationLoss, table=False):
    """A loss that changes while the model is trained.

    The loss must know how much of the training is done. The adapter of a framework overrides
    :meth:`progress` and reads that from the framework. In your own training loop, call
    :meth:`set_progress`.
    """

    _progress: Optional[float] = None

    def set_progress(self, progress: float) -> None:
        """Sets the part of the training that is done, in [0, 1]; values outside are clamped."""
        self._progress = float(progress)

    @looked_up
    def now(self) -> float:
        """:meth:`progress`, never as a constant of a compiled graph."""
        return self.progress()

    def progress(self) -> float:
        """The part of the training that is done.

        Raises:
            UserError: it was not set.
        """
        if self._progress is None:
            raise UserError(
                f"{type(self).__name__} does not know the training's progress: call"
                " set_progress(iteration / max(1, max_iterations - 1)) before each step, train with"
                " MMEngine's Runner, which publishes it, or register"
                " polyfocal.detectron2.ProgressHook() with Detectron2's trainer"
            )
        return self._progress


def keywords_of(cls: type[Loss]) -> list[str]:
    """The keywords of a constructor, with those that its ``**`` hands to the next constructor."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base) and issubclass(base, Loss):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names.update(
                {p.name: None for p in list(parameters)[1:] if p.kind is not p.VAR_KEYWORD}
            )
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return list(names)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        value = tuple(value.tolist()) if value.device.type == "cpu" else f"{tuple(value.shape)}"
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        entries = [f"{entry:g}" for entry in value]
        if len(entries) > _SHOWN:
            entries = [*entries[:3], "...", *entries[-1:], f"{len(entries)} numbers"]
        return f"({', '.join(entries)})"
    return str(value)
