"""Losses and their gradients drawn against p_t, and the schedule of cyclical ones."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyfocal.data.files import written_whole
from polyfocal.errors import UserError
from polyfocal.losses import (
    LOSSES,
    ClassificationLoss,
    CyclicalFocalLoss,
    DebiasedFocalLoss,
    DebiasingLoss,
    ProductOfExpertsLoss,
)
from polyfocal.losses.schedule import cyclical_weight

FORMATS = (".png", ".svg")
# Okabe and Ito's colours, told apart by colour-blind people too, without the yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES: tuple[Any, ...] = ("solid", "dashdot", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)))


@dataclass
class Curve:
    """A loss at one moment of the training, and its name in the legend."""

    name: str
    loss: ClassificationLoss
    progress: float | None = None
    bias: float | None = None  # the bias model's probability of the target


def loss_and_gradient(
    loss: ClassificationLoss, p_t: Tensor, positive: bool = True, bias: float | None = None
) -> tuple[Tensor, Tensor]:
    """Value and derivative of a loss for one entry of given p_t.

    Args:
        loss: a sigmoid loss, which gets one logit, or a softmax loss, which gets two.
        p_t: probabilities of the target, (N,), inside (0, 1).
        positive: the entry's target is 1; False for 0, which a softmax loss does not have.
        bias: probability that a bias model gives to the target, for a loss that needs one.

    Returns:
        The loss L and dL/dp_t, both (N,) in the dtype of p_t.
    """
    activated = getattr(loss, "activated", False)

    def logits_of(p_t: Tensor) -> Tensor:
        p = p_t if positive else 1 - p_t
        logits = (p if activated else torch.logit(p)).unsqueeze(1)
        if loss.use_sigmoid:
            return logits
        return torch.cat([logits, torch.zeros_like(logits)], dim=1)

    p_t = p_t.detach().requires_grad_()
    biased = {} if bias is None else {"bias_logits": logits_of(torch.full_like(p_t, bias))}
    # With one class, label 0 is that class and label 1 the background.
    target = torch.full(p_t.shape, 0 if positive else 1)
    value = loss(logits_of(p_t), target, reduction_override="none", **biased).reshape(p_t.shape)
    (gradient,) = torch.autograd.grad(value.sum(), p_t)
    return value.detach(), gradient


def best_scores(loss: ClassificationLoss, shares: Tensor) -> Tensor:
    """The score of the least average loss, if the target is 1 in a part of the cases.

    Args:
        loss: a loss of the sigmoid form.
        shares: the parts, (N,), inside (0, 1).

    Returns:
        Probabilities, (N,), to 1e-4.

    Raises:
        UserError: the loss has the softmax form, or needs a bias model.
    """
    if not loss.use_sigmoid or isinstance(loss, DebiasingLoss):
        raise UserError(
            f"{type(loss).__name__}: scores are drawn for losses of the sigmoid form that need no"
            " bias model"
        )
    p = torch.linspace(1e-4, 1 - 1e-4, 9999, dtype=torch.float64)
    positive = loss_and_gradient(loss, p)[0]
    negative = loss_and_gradient(loss, 1 - p, positive=False)[0]
    each = shares.double().unsqueeze(1)
    return p[(each * positive + (1 - each) * negative).argmin(dim=1)]


def draw_scores(curves: Sequence[Curve], out: Path) -> None:
    """Draw :func:`best_scores` of each curve into a PNG or SVG file.

    Raises:
        UserError: a loss has none, the file cannot be written or has another ending, or matplotlib
            is missing.
    """
    Figure = _figure(out)
    shares = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    figure = Figure(figsize=(5.2, 4.6 + 0.2 * len(curves)), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.8", lw=1)
    for i, curve in enumerate(curves):
        if isinstance(curve.loss, CyclicalFocalLoss) and curve.progress is not None:
            curve.loss.set_progress(curve.progress)
        color, dashes = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
        scores = best_scores(curve.loss, shares)
        axes.plot(shares, scores, label=curve.name, color=color, linestyle=dashes, lw=1.8)
    axes.set(
        xlabel="part of such detections that are right",
        ylabel="score that costs least",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False)
    _save(figure, out)


def build_loss(kind: str, settings: dict[str, Any]) -> ClassificationLoss:
    """The module of a type and its keywords, in the sigmoid form if they do not name a form.

    Raises:
        UserError: there is no such type, keyword or value.
    """
    if kind not in LOSSES.of_logits():
        known = ", ".join(LOSSES.of_logits())
        raise UserError(f"there is no loss {kind!r}: expected one of {known}")
    keywords = inspect.signature(LOSSES[kind]).parameters
    if keywords["use_sigmoid"].default is None:
        settings = {"use_sigmoid": True, **settings}
    loss: Any = LOSSES.build(kind, settings)
    return loss


def name_of(kind: str, settings: dict[str, Any]) -> str:
    """A loss with the settings that differ from its defaults, for a legend."""
    default = {key: one.default for key, one in inspect.signature(LOSSES[kind]).parameters.items()}
    shown = [
        f"{key}={value}"
        for key, value in settings.items()
        if key == "epsilon" or (key != "use_sigmoid" and value != default.get(key))
    ]
    return " ".join([kind, *shown])


def curves_of(
    name: str, loss: ClassificationLoss, progress: list[float], biases: list[float]
) -> list[Curve]:
    """The curves of one loss: one, or one for each progress (cyclical) or bias (debiasing).

    Raises:
        UserError: a number is out of its range.
    """
    for t in progress:
        if not 0 <= t <= 1:
            raise UserError(f"--progress {t:g}: expected numbers from 0 to 1")
    for bias in biases:
        if not 0 < bias < 1:
            raise UserError(f"--bias {bias:g}: expected probabilities above 0 and below 1")
    if isinstance(loss, DebiasedFocalLoss | ProductOfExpertsLoss):
        return [Curve(f"{name}, bias model at {bias:g}", loss, bias=bias) for bias in biases]
    if not isinstance(loss, CyclicalFocalLoss):
        return [Curve(name, loss)]
    return [
        Curve(f"{name}, progress {t:g} (ξ = {cyclical_weight(t, loss.factor):.2g})", loss, t)
        for t in progress
    ]


def draw(curves: Sequence[Curve], out: Path, *, log: bool = False, negatives: bool = False) -> None:
    """Draw the curves into a PNG or SVG file, and the schedules of cyclical losses.

    Args:
        curves: what to draw.
        out: file to write; its extension chooses the format.
        log: logarithmic vertical axes.
        negatives: also the entries with target 0 of sigmoid losses, dotted.

    Raises:
        UserError: the file cannot be written or has another ending, or matplotlib is missing.
    """
    Figure = _figure(out)
    p_t = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    cyclical = [curve for curve in curves if curve.progress is not None]
    panels = 3 if cyclical else 2
    figure = Figure(figsize=(4.6 * panels, 4.2 + 0.2 * len(curves)), layout="constrained")
    loss_axes, gradient_axes, *rest = figure.subplots(1, panels)
    tops = [0.0, 0.0]
    drawn: list[Tensor] = []
    for i, curve in enumerate(curves):
        if isinstance(curve.loss, CyclicalFocalLoss) and curve.progress is not None:
            curve.loss.set_progress(curve.progress)
        color, dashes = COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
        of_positive = loss_and_gradient(curve.loss, p_t, bias=curve.bias)
        same = sum(torch.allclose(of_positive[0], other) for other in drawn)
        drawn.append(of_positive[0])
        if same:  # the curves below show through the gaps
            dashes = (0, (4, 4 * same))
        for positive in (True, False):
            if not positive and not (negatives and curve.loss.use_sigmoid):
                continue
            both = of_positive
            if not positive:
                both = loss_and_gradient(curve.loss, p_t, positive, curve.bias)
            for k, axes in enumerate((loss_axes, gradient_axes)):
                values = both[k].abs()
                # The gradient of a cross-entropy is 1 / p_t: leave room for the rest.
                tops[k] = max(tops[k], values[p_t >= 0.1].max().item())
                label = curve.name if positive and k == 0 else None
                linestyle = dashes if positive else "dotted"
                axes.plot(p_t, values, label=label, color=color, linestyle=linestyle, lw=1.8)
    target = "" if negatives else ", target 1"
    loss_axes.set(title=f"loss{target}", ylabel="$L$")
    gradient_axes.set(title=f"gradient with respect to $p_t${target}", ylabel=r"$|dL / dp_t|$")
    if negatives:
        loss_axes.plot([], [], label="dotted: target 0", linestyle="dotted", color="0.4")
    for axes, top in zip((loss_axes, gradient_axes), tops, strict=True):
        axes.set(xlabel=r"$p_t$, the probability of the target", xlim=(0, 1))
        if log and top > 0:
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-5))
        else:
            axes.set_ylim(0, 1.05 * top or 1.0)
    if rest:
        _draw_schedules(rest[0], cyclical)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = loss_axes.get_legend_handles_labels()
    columns = 1 if max(map(len, names)) * 2 > 50 * panels else 2
    figure.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False)

    _save(figure, out)


def _figure(out: Path) -> Any:
    """The class of a picture, for a file that can be written."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    return Figure


def _save(figure: Any, out: Path) -> None:
    from matplotlib import rc_context

    # The same command gives the same SVG, with text as text: no date, no random ids.
    metadata = {"Date": None} if out.suffix.lower() == ".svg" else None
    with (
        rc_context({"svg.hashsalt": "polyfocal", "svg.fonttype": "none"}),
        written_whole(out) as part,
    ):
        figure.savefig(part, dpi=110, metadata=metadata)


def _draw_schedules(axes: Any, curves: list[Curve]) -> None:
    """The weight xi over the training: a line per factor, a dot per drawn moment."""
    time = [i / 400 for i in range(401)]
    factors = {curve.loss.factor for curve in curves if isinstance(curve.loss, CyclicalFocalLoss)}
    for factor, linestyle in zip(sorted(factors), DASHES * len(factors), strict=False):
        xi = [cyclical_weight(t, factor) for t in time]
        axes.plot(time, xi, color="0.4", linestyle=linestyle, label=f"factor {factor:g}", zorder=1)
        moments = sorted({curve.progress for curve in curves if curve.progress is not None})
        axes.scatter(moments, [cyclical_weight(t, factor) for t in moments], color="0.2", zorder=2)
    axes.set(
        title="schedule",
        xlabel="progress, the part of the training that is done",
        ylabel="ξ, weight of the high-confidence term",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.04),
    )
    axes.legend(frameon=False)
