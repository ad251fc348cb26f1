"""The settings of losses: what they may be, where a search looks, and the keywords that all share.

A setting is checked once, when it is set: by the constructor of a module, by an assignment to its
attribute, or by a call of a function. Numbers may be Python's, NumPy's or tensors without a
dimension. A number that is out of its range only by rounding is taken as the bound.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from polyfocal._torch import autocast_off, is_compiling
from polyfocal.errors import UserError

PerClass = float | Sequence[float] | Tensor
REDUCTIONS = ("none", "mean", "sum")
BY_COUNTS = ("balanced", "effective", "sqrt")
"""What a config may say instead of numbers, for weights computed from the training data."""
FROM_DATA = ("class_weight", "alpha")
"""The settings for which a config may say so."""
_ROUNDING = 1e-6
_F = TypeVar("_F", bound=Callable[..., Any])


class Common(TypedDict, total=False):
    """Keywords of every function of labels and logits; see :mod:`polyfocal.losses.rows`."""

    class_weight: Sequence[float] | Tensor | None
    ignore_index: int | None
    reduction: str
    avg_factor: Tensor | float | None


class Shared(TypedDict, total=False):
    """Keywords of every module of labels and logits; see :mod:`polyfocal.losses.rows`."""

    reduction: str
    loss_weight: float
    class_weight: Sequence[float] | Tensor | None
    ignore_index: int | None


_DEFAULTS: dict[str, Any] = {
    "class_weight": None,
    "ignore_index": None,
    "reduction": "mean",
    "avg_factor": None,
    "loss_weight": 1.0,
    "bias": None,
    "bias_weight": 1.0,
    "anneal_to": 1.0,
}


@dataclass(frozen=True)
class Range:
    """The values of a setting that are worth a search.

    Attributes:
        low, high: The bounds, included.
        log: Whether to search on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


def as_number(value: Any) -> int | float | None:
    """The value as one of Python's numbers, None if it is none."""
    if isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0:
        value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (int, float)) else None


@dataclass(frozen=True)
class Setting:
    """What a setting may be.

    Attributes:
        search: Where a search looks; None for nowhere.
    """

    search: Range | None = None

    def checked(self, name: str, value: Any, owner: str) -> Any:
        """The value as the loss keeps it.

        Raises:
            UserError: the setting may not have this value.
        """
        return value

    def tunable(self, name: str, value: Any) -> dict[str, Range]:
        """The ranges of a search, by keyword; ``epsilons.0`` is an entry of one."""
        return {} if self.search is None else {name: self.search}


@dataclass(frozen=True)
class Number(Setting):
    """A finite number.

    Attributes:
        low, high: The bounds, included unless ``without`` names one.
        without: 'low' or 'high', the bound that is excluded.
        optional: None is a value too.
        why: Added to the message that refuses a number.
        missing: What the message says to do if None is given.
    """

    low: float = 0.0
    high: float = math.inf
    without: str = ""
    optional: bool = False
    why: str = ""
    missing: str = ""

    def checked(self, name: str, value: Any, owner: str) -> float | None:
        if value is None and self.optional:
            return None
        if value is None and self.missing:
            raise UserError(f"{owner} has no {name}: {self.missing}")
        number = as_number(value)
        if number is not None and not isinstance(number, bool) and math.isfinite(number):
            inside = min(max(number, self.low), self.high)
            left_out = {"low": self.low, "high": self.high}.get(self.without)
            if abs(inside - number) <= _ROUNDING and inside != left_out:
                return inside
        raise UserError(f"{name}={value}: expected a {self._limits()}{self.why}")

    def _limits(self) -> str:
        if self.high < math.inf:
            brackets = "(" if self.without == "low" else "[", ")" if self.without == "high" else "]"
            return f"number in {brackets[0]}{self.low:g}, {self.high:g}{brackets[1]}"
        if self.low == -math.inf:
            return "finite number"
        return f"finite number {'>' if self.without == 'low' else '>='} {self.low:.4g}"


@dataclass(frozen=True)
class Whole(Setting):
    """A whole number >= ``low``; None too if it is ``optional``, which ``else_`` says in words."""

    low: float = -math.inf
    optional: bool = False
    else_: str = ""

    def checked(self, name: str, value: Any, owner: str) -> int | None:
        if value is None and self.optional:
            return None
        number = as_number(value)
        if isinstance(number, int) and not isinstance(number, bool) and number >= self.low:
            return number
        least = f" >= {self.low:g}" if self.low > -math.inf else ""
        raise UserError(f"{name}={value}: expected a whole number{least}{self.else_}")


@dataclass(frozen=True)
class Flag(Setting):
    """True or False."""

    def checked(self, name: str, value: Any, owner: str) -> bool:
        flag = as_number(value)  # NumPy's too
        if not isinstance(flag, bool):
            raise UserError(f"{name}={value!r}: expected True or False")
        return flag


@dataclass(frozen=True)
class OneOf(Setting):
    """One of some texts."""

    values: tuple[str, ...] = ()

    def checked(self, name: str, value: Any, owner: str) -> str:
        if value not in self.values:
            raise UserError(f"{name}={value!r}: expected one of {', '.join(self.values)}")
        return str(value)


@dataclass(frozen=True)
class Form(Setting):
    """``use_sigmoid``: either form, or the only one that a loss has.

    Attributes:
        only: The form of a loss that has only one.
        what: How a message calls the loss.
    """

    only: bool | None = None
    what: str = ""

    def checked(self, name: str, value: Any, owner: str) -> bool:
        form = as_number(value)  # NumPy's too
        if not isinstance(form, bool):
            raise UserError(
                f"{owner} has use_sigmoid={value}: write use_sigmoid=True (one binary problem per"
                " class, as in dense heads) or use_sigmoid=False (softmax) beside its type, because"
                " heads read that key"
            )
        if self.only is not None and form is not self.only:
            what = self.what or owner
            raise UserError(
                f"use_sigmoid={form}: the {what} is defined for use_sigmoid={self.only}"
            )
        return form


@dataclass(frozen=True)
class Numbers(Setting):
    """One number >= 0 per class: a sequence, an array or a tensor.

    Attributes:
        high: The largest number.
        single: One number for all classes is allowed too.
        optional: None is a value too.
    """

    high: float = math.inf
    single: bool = False
    optional: bool = True

    def checked(self, name: str, value: Any, owner: str) -> Any:
        if value is None and self.optional:
            return None
        if name in FROM_DATA and isinstance(value, (str, Mapping)):
            method = named_method(name, value)
            raise UserError(
                f"{name}={method!r} is computed from the training data, which a loss alone does not"
                " have: tools/train.py and tools/train_detectron2.py do it when they prepare a"
                f" training, elsewhere give numbers, such as class_weights(counts, {method!r}) of"
                " polyfocal.losses.functional"
            )
        number = as_number(value)
        if number is not None:
            if not self.single:
                raise UserError(f"{name}={value}: expected one number per class")
            return self._entry(name, value)
        if isinstance(value, Tensor) and value.device.type != "cpu" and value.dim() == 1:
            return value  # reading it would stop the device
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape) != 1:
            raise UserError(f"{name} has shape {tuple(shape)}: expected one number per class")
        given = value.tolist() if shape is not None else value
        entries = list(given) if isinstance(given, Sequence) else [given]
        if not entries:
            raise UserError(f"{name} is empty: expected one number per class")
        entries = [self._entry(name, entry) for entry in entries]
        return value if isinstance(value, Tensor) else torch.tensor(entries, dtype=torch.float64)

    def _entry(self, name: str, value: Any) -> float:
        number = as_number(value)
        if number is not None and not isinstance(number, bool) and math.isfinite(number):
            inside = min(max(number, 0.0), self.high)
            if abs(inside - number) <= _ROUNDING:
                return inside
        limits = "in [0, 1]" if self.high == 1 else ">= 0"
        raise UserError(f"{name} holds {value}: expected finite numbers {limits}")


def named_method(name: str, value: str | Mapping[str, Any]) -> str:
    """The method by which a setting is to be computed from the training data.

    Raises:
        UserError: there is none of that name.
    """
    method = value if isinstance(value, str) else value.get("method")
    if method not in BY_COUNTS:
        what = repr(value) if isinstance(value, str) else dict(value)
        raise UserError(
            f"{name}={what}: expected numbers, one per class, or one of {', '.join(BY_COUNTS)}, or"
            " dict(method='effective', beta=0.999)"
        )
    return method


@dataclass(frozen=True)
class Coefficients(Setting):
    """(epsilon_1, ..., epsilon_N), epsilon_j >= -1/j, so that no power of (1 - p_t) is rewarded."""

    def checked(self, name: str, value: Any, owner: str) -> tuple[Any, ...]:
        given = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(given, Sequence) or len(given) == 0:
            raise UserError(f"{name}={value}: expected a list of at least one coefficient")
        return tuple(
            _epsilon(j).checked(name if len(given) == 1 else f"{name}[{j - 1}]", entry, owner)
            for j, entry in enumerate(given, start=1)
        )

    def tunable(self, name: str, value: Any) -> dict[str, Range]:
        return {f"{name}.{j}": Range(-1.0 / (j + 1), 5.0) for j in range(len(value))}


def _epsilon(j: int) -> Number:
    # The range begins at PolyLoss's bound; the paper's best values, -1 and 2, are within.
    return Number(
        Range(-1.0, 5.0),
        low=-1 / j,
        why=", below which the loss rewards errors",
        missing="write one, >= -1 (0 is the loss without its Poly-1 term); the best value depends"
        " on the task",
    )


# Where the papers looked: gamma in RetinaNet's table 1b, alpha where its table 1a has an AP at all.
EPSILON = _epsilon(1)
GAMMA = Number(Range(0.0, 5.0))
ALPHA = Numbers(Range(0.1, 0.9), high=1.0, single=True)
# No paper searches loss_weight. A factor of 4 either way changes its share beside the box loss.
LOSS_WEIGHT = Number(Range(0.25, 4.0, log=True))
SMOOTHING = Number(high=1.0, without="high")
CLASS_WEIGHT = Numbers()
REDUCTION = OneOf(values=REDUCTIONS)


def check_smoothing(label_smoothing: float, use_sigmoid: bool, soft: bool = False) -> None:
    """Raises UserError for label smoothing in a form that does not define it."""
    if label_smoothing > 0 and (use_sigmoid or soft):
        raise UserError(
            f"label_smoothing={label_smoothing} is given with"
            f" {'use_sigmoid=True' if use_sigmoid else 'soft targets'}: it is defined for the"
            " softmax form with integer labels"
        )


def spelled_out(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with ``**common`` replaced by the keywords that it stands for."""
    signature = inspect.signature(function)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        keywords = getattr(parameter.annotation, "__args__", None)
        if parameter.kind is parameter.VAR_KEYWORD and keywords:
            parameters += [
                inspect.Parameter(
                    name, parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=of
                )
                for name, of in keywords[0].__annotations__.items()
            ]
        else:
            parameters.append(parameter)
    return signature.replace(parameters=parameters)


def check_settings(
    owner: str, settings: dict[str, Setting], given: dict[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """The given keywords, checked.

    Raises:
        UserError: a value that a setting may not have.
        TypeError: a keyword that the owner does not have.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no keyword {name!r}: it takes {', '.join(known)}")
    return {
        name: settings[name].checked(name, value, owner) if name in settings else value
        for name, value in given.items()
    }


def loss_function(**settings: Setting) -> Callable[[_F], _F]:
    """Makes a loss function check its settings.

    The function gets two attributes: ``settings``, and ``unchecked``, the function without the
    checks. A module has checked its settings when they were set, so it calls ``unchecked``.
    """
    every: dict[str, Setting] = {
        "use_sigmoid": Form(),
        **settings,
        "class_weight": CLASS_WEIGHT,
        "reduction": REDUCTION,
    }

    def decorate(function: _F) -> _F:
        signature = spelled_out(function)
        known = list(signature.parameters)

        @functools.wraps(function)
        def checked(*tensors: Any, **keywords: Any) -> Any:
            # Under torch.compile a number may be a symbol, of which nothing is known.
            if not is_compiling():
                keywords = check_settings(function.__name__, every, keywords, known)
            first = tensors[0] if tensors else keywords.get(known[0])
            with autocast_off(first.device.type if isinstance(first, Tensor) else "cpu"):
                return function(*tensors, **keywords)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.settings = settings  # type: ignore[attr-defined]
        checked.unchecked = function  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


class ExactBuffers(nn.Module):
    """A module whose buffers keep their precision in ``model.half()`` and ``model.bfloat16()``."""

    def _apply(self, *args: Any, **kwargs: Any) -> "ExactBuffers":
        before = dict(self._buffers)
        super()._apply(*args, **kwargs)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


__all__ = [
    "ALPHA",
    "BY_COUNTS",
    "CLASS_WEIGHT",
    "EPSILON",
    "FROM_DATA",
    "GAMMA",
    "LOSS_WEIGHT",
    "SMOOTHING",
    "Coefficients",
    "Common",
    "ExactBuffers",
    "Flag",
    "Form",
    "Number",
    "Numbers",
    "OneOf",
    "PerClass",
    "Range",
    "Setting",
    "Shared",
    "Unpack",
    "Whole",
    "as_number",
    "check_settings",
    "check_smoothing",
    "loss_function",
    "named_method",
    "spelled_out",
]
