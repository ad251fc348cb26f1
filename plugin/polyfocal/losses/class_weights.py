r"""Weights of classes from how many training samples each has.

With n_c samples of class c, P classes that have a sample, and N samples in all:

=============  ==============================================================================
``balanced``   N / (P n_c): the samples of a class together weigh the same for every class, and a
               sample weighs 1 on average, as with scikit-learn's ``class_weight="balanced"``
``sqrt``       the square root of that, halfway to equal weights on a logarithmic scale
``effective``  proportional to (1 - beta) / (1 - beta^n_c), and 1 on average over the classes:
               one over the effective number of samples, Cui et al., Class-Balanced Loss Based on
               Effective Number of Samples (2019), proposition 1 and section 4. beta = 0 weighs
               all classes alike, beta towards 1 by one over n_c
=============  ==============================================================================

A class without a sample weighs 1, and takes no part in the scale of the others.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyfocal.errors import UserError
from polyfocal.losses.settings import (
    BY_COUNTS,
    FROM_DATA,
    Number,
    Numbers,
    OneOf,
    PerClass,
    named_method,
)

BETA = 0.999
"""Default beta of ``effective``: what the paper takes for its largest data sets."""
ALPHA = 0.25
"""The alpha of a class of weight 1 in the sigmoid form."""
_MOST_NAMES = 20  # classes that a line on the console names


class Weighing(NamedTuple):
    """How weights come from counts: what a config may say instead of numbers."""

    method: str
    beta: float = BETA

    def __str__(self) -> str:
        beta = f" (beta {self.beta:g})" if self.method == "effective" else ""
        return f"{self.method}{beta}"


def class_weights(class_counts: PerClass, method: str = "balanced", beta: float = BETA) -> Tensor:
    """Weights of classes from counts, as ``class_weight`` takes them; see the module for formulas.

    Args:
        class_counts: n, training samples of each class, >= 0, one of them above 0.
        method: 'balanced', 'effective' or 'sqrt'.
        beta: beta of 'effective', in [0, 1).

    Returns:
        float64, one per class.

    Raises:
        UserError: a value is out of its range.

    Example:
        >>> class_weights([10, 90]).tolist()
        [5.0, 0.5555555555555556]
    """
    OneOf(values=BY_COUNTS).checked("method", method, "class_weights")
    beta_ = Number(high=1.0, without="high").checked("beta", beta, "class_weights")
    counts = Numbers(optional=False).checked("class_counts", class_counts, "class_weights")
    counts = torch.as_tensor(counts, dtype=torch.float64)
    present = counts > 0
    if not present.any():
        raise UserError("class_counts: expected one number per class, one of them above 0")
    n = counts[present]
    if method == "effective":
        assert beta_ is not None
        # 1 - beta^n without the cancellation of a beta near 1.
        inverse = (1 - beta_) / -torch.expm1(n * (math.log(beta_) if beta_ else -math.inf))
        weights = inverse / inverse.mean()
    else:
        weights = n.sum() / (len(n) * n)
        if method == "sqrt":
            weights = weights.sqrt()
    found = torch.ones_like(counts)
    found[present] = weights
    return found


def class_alphas(weights: Tensor, use_sigmoid: bool) -> Tensor:
    """The alphas that weights of classes make, as ``alpha`` takes them.

    In the sigmoid form :math:`w / (w + 3)`: the positives of a class weigh w times as much beside
    its negatives as with alpha 0.25. In the softmax form, which weighs rows, :math:`w / max w`.

    Args:
        weights: w, one per class, see :func:`class_weights`.
        use_sigmoid: the form of the loss.
    """
    if use_sigmoid:
        return weights * ALPHA / (weights * ALPHA + 1 - ALPHA)
    return weights / weights.max()


def weighing(name: str, value: Any) -> Weighing | None:
    """How a setting is to be computed from the data; None for any other value.

    Args:
        name: name of the setting, ``class_weight`` or ``alpha``.
        value: its value in a config: a method, or ``dict(method="effective", beta=0.999)``.

    Raises:
        UserError: there is no such method, or it does not have such a keyword.
    """
    if not isinstance(value, str | Mapping):
        return None
    method = named_method(name, value)
    given = dict(value) if isinstance(value, Mapping) else {}
    known = ("method", "beta") if method == "effective" else ("method",)
    for keyword in given:
        if keyword not in known:
            raise UserError(
                f"{name} has {keyword!r} beside method={method!r}: expected {' and '.join(known)}"
            )
    beta = Number(high=1.0, without="high").checked("beta", given.get("beta", BETA), name)
    return Weighing(method, BETA if beta is None else beta)


def from_data(loss: Any, settings: Mapping[str, Any]) -> list[str]:
    """The settings of a config that are to be computed from the training data.

    Args:
        loss: class of the loss.
        settings: its settings in the config.

    Raises:
        UserError: as :func:`weighing`.
    """
    return [
        name
        for name in FROM_DATA
        if isinstance(loss.settings.get(name), Numbers) and weighing(name, settings.get(name))
    ]


def no_alpha(loss: Any, settings: Mapping[str, Any]) -> dict[str, None]:
    """``alpha=None`` for a softmax loss whose alpha was chosen for the sigmoid form.

    There it balances positives and negatives; in the softmax form it would divide every row alike.

    Args:
        loss: class of the loss.
        settings: its settings in a config.
    """
    own = inspect.signature(loss).parameters.get("alpha")
    has = "alpha" in settings or (own is not None and isinstance(own.default, float))
    return {"alpha": None} if has and settings.get("use_sigmoid") is False else {}


def use_counts(
    settings: Any,
    place: str,
    class_counts: Mapping[str, int] | None,
    *,
    use_sigmoid: bool,
    background: bool,
) -> list[str]:
    """Replace what a loss's config asks for by numbers.

    Args:
        settings: settings of the loss, changed in place.
        place: place of the loss in the config, for messages.
        class_counts: training samples by the names of the classes. None if there is no
            training, and so no loss: the settings become None.
        use_sigmoid: the form of the loss.
        background: whether the last column is the background, which weighs 1.

    Returns:
        A sentence per setting, with the numbers.
    """
    found = []
    for name in FROM_DATA:
        asked = weighing(name, settings.get(name))
        if asked is None:
            continue
        if class_counts is None:
            settings[name] = None  # some heads read the key
            continue
        weights = class_weights(list(class_counts.values()), *asked)
        if background:
            weights = torch.cat([weights, weights.new_ones(1)])
        if name == "alpha":
            weights = class_alphas(weights, use_sigmoid)
        # Six digits, as a person would write them in a config.
        settings[name] = [float(f"{weight:.6g}") for weight in weights.tolist()]
        names = [*class_counts, "background"]
        found.append(f"{place}.{name} is {asked} of the training data: {_listed(names, weights)}.")
    return found


def _listed(names: Sequence[str], weights: Tensor) -> str:
    pairs = list(zip(names, weights.tolist(), strict=False))
    if len(pairs) > _MOST_NAMES:
        low, high = (choose(pairs, key=lambda one: one[1]) for choose in (min, max))
        return f"from {low[1]:.3g} ({low[0]}) to {high[1]:.3g} ({high[0]})"
    return ", ".join(f"{name} {weight:.3g}" for name, weight in pairs)
