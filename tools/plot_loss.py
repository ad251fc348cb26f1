#!/usr/bin/env python
"""Draw losses and their gradients against p_t, and the schedule of cyclical ones."""

import argparse
import ast
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polyfocal.losses
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import run_tool
from polyfocal.losses import (
    ClassificationLoss,
    CyclicalFocalLoss,
    DebiasedFocalLoss,
    ProductOfExpertsLoss,
)
from polyfocal.losses.schedule import cyclical_weight

DESCRIPTION = """\
Draw losses and the magnitude of their gradient against p_t, the probability that the model gives
to the target, and the schedule of cyclical losses over the training. The losses are the real
modules, fed with the logits that give each p_t; nothing is trained and nothing downloaded.

A loss is a type and its settings: --loss Poly1FocalLoss epsilon=-1 gamma=2. A loss that does not
say use_sigmoid is drawn in its sigmoid form (Poly1CrossEntropyLoss in its softmax form, its
default). The softmax form is drawn for two classes."""

EPILOG = """\
examples:
  what epsilon does to the focal loss, on a logarithmic scale
    python tools/plot_loss.py --loss FocalLoss --loss Poly1FocalLoss epsilon=-1 \\
        --loss Poly1FocalLoss epsilon=1 --log --out epsilon.svg

  the losses of two configs
    python tools/plot_loss.py configs/retinanet_focal.py configs/retinanet_poly1.py

  a cyclical loss at the start, at its focal end and half way back, and what negatives get
    python tools/plot_loss.py --loss CyclicalFocalLoss --progress 0 0.25 0.625 --negatives
"""

FORMATS = (".png", ".svg")
LOSSES: dict[str, type[ClassificationLoss]] = {
    name: loss
    for name, loss in sorted(polyfocal.losses.LOSSES.items())
    if issubclass(loss, ClassificationLoss)
}
# Okabe and Ito's colours, told apart by colour-blind people too, without the yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES: tuple[Any, ...] = ("solid", "dashdot", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)))


@dataclass
class Curve:
    """A loss at one moment of the training, and how the legend calls it."""

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
        bias: what a bias model gives to the target, for a loss that asks for one.

    Returns:
        The loss L and dL/dp_t, both (N,) in the dtype of p_t.
    """

    def logits_of(p_t: Tensor) -> Tensor:
        logits = torch.logit(p_t if positive else 1 - p_t).unsqueeze(1)
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


def build_loss(kind: str, settings: dict[str, Any]) -> ClassificationLoss:
    """The module of a type and its keywords.

    Raises:
        UserError: there is no such type, keyword or value.
    """
    if kind not in LOSSES:
        raise UserError(f"there is no loss {kind!r}: expected one of {', '.join(LOSSES)}")
    keywords = inspect.signature(LOSSES[kind]).parameters
    unknown = [key for key in settings if key not in keywords]
    if unknown:
        raise UserError(f"{kind} has no keyword {unknown[0]!r}: expected {', '.join(keywords)}")
    if keywords["use_sigmoid"].default is None:
        settings = {"use_sigmoid": True, **settings}
    missing = [
        key
        for key, keyword in keywords.items()
        if keyword.default is inspect.Parameter.empty and key not in settings
    ]
    if missing:
        raise UserError(f"{kind} needs {missing[0]}=...")
    try:
        return LOSSES[kind](**settings)
    except TypeError as error:  # a list for a number, or the other way round
        raise UserError(f"{kind} does not take these settings: {error}") from None


def curves_of(
    name: str, loss: ClassificationLoss, progress: list[float], biases: list[float]
) -> list[Curve]:
    """The curves of one loss: one, or one for each progress (cyclical) or bias (debiasing)."""
    if isinstance(loss, DebiasedFocalLoss | ProductOfExpertsLoss):
        return [Curve(f"{name}, bias model at {bias:g}", loss, bias=bias) for bias in biases]
    if not isinstance(loss, CyclicalFocalLoss):
        return [Curve(name, loss)]
    return [
        Curve(f"{name}, progress {t:g} (ξ = {cyclical_weight(t, loss.factor):.2g})", loss, t)
        for t in progress
    ]


def parse_loss(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Type and settings from the words ``TYPE KEY=VALUE ...`` of a command line.

    Raises:
        UserError: a word is not KEY=VALUE, or its value is not a Python literal.
    """
    kind, *rest = words
    settings = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(
                f"--loss {kind} is followed by {word!r}: expected KEY=VALUE (configs go before the"
                " first --loss)"
            )
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(
                f"--loss {kind} has {word}: expected a number, a list such as '[0.5,0.2]', True,"
                " False or None after the ="
            ) from None
    return kind, settings


def losses_of_config(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Types and settings of the losses in a config of MMEngine's, each once.

    MMDetection's FocalLoss counts as the one of this package, which gives the same numbers.

    Raises:
        UserError: the file is no config, or has no such loss.
    """
    try:
        from mmengine.config import Config
    except ModuleNotFoundError:
        raise UserError(f"reading {path} needs MMEngine: pip install mmengine") from None
    if not Path(path).is_file():
        raise UserError(f"there is no config {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            model = Config.fromfile(path).get("model")
    except Exception as error:  # a config is a program: it can fail in any way
        text = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read as a config: {type(error).__name__}: {text}"
        ) from None
    found: list[tuple[str, dict[str, Any]]] = []
    for node in _dicts(model):
        kind = node.get("type")  # a class, in a config with imports
        dotted = f"{kind.__module__}.{kind.__name__}" if isinstance(kind, type) else str(kind)
        scope, kind = dotted.rpartition(".")[0].partition(".")[0], dotted.rpartition(".")[2]
        settings = {key: value for key, value in node.items() if key != "type"}
        if scope in ("", "polyfocal", "mmdet") and kind in LOSSES and (kind, settings) not in found:
            found.append((kind, settings))
    if not found:
        raise UserError(
            f"{path} has no loss of this package; plain cross-entropy is --loss"
            " Poly1CrossEntropyLoss epsilon=0"
        )
    return found


def _dicts(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from _dicts(child)


def draw(curves: list[Curve], out: Path, *, log: bool = False, negatives: bool = False) -> None:
    """Draw the curves, and the schedule where one is cyclical, into a PNG or SVG file.

    Args:
        curves: what to draw.
        out: file to write; its extension says the format.
        log: logarithmic vertical axes.
        negatives: also the entries with target 0 of sigmoid losses, dotted.

    Raises:
        UserError: the file cannot be written, or matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None

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
        values = loss_and_gradient(curve.loss, p_t, bias=curve.bias)[0]
        same = sum(torch.allclose(values, other) for other in drawn)
        drawn.append(values)
        if same:  # the curves below show through the gaps
            dashes = (0, (4, 4 * same))
        for positive in (True, False):
            if not positive and not (negatives and curve.loss.use_sigmoid):
                continue
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

    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The same command gives the same SVG, with text as text: no date, no random ids.
        with rc_context({"svg.hashsalt": "polyfocal", "svg.fonttype": "none"}):
            metadata = {"Date": None} if out.suffix.lower() == ".svg" else None
            figure.savefig(part, dpi=110, metadata=metadata)
        os.replace(part, out)
    except FileExistsError:
        raise UserError(f"cannot write {out}: {out.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    finally:
        if part.is_file():
            part.unlink()


def _draw_schedules(axes: Any, curves: list[Curve]) -> None:
    """The weight xi over the training, a line for each factor and a dot for each moment drawn."""
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "configs", nargs="*", metavar="CONFIG", help="configs whose losses to draw (needs MMEngine)"
    )
    parser.add_argument(
        "--loss",
        nargs="+",
        action="append",
        default=[],
        metavar=("TYPE", "KEY=VALUE"),
        help=f"a loss to draw, may be repeated; TYPE is one of {', '.join(LOSSES)}",
    )
    parser.add_argument(
        "--progress",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75],
        metavar="T",
        help="moments of the training, 0 to 1, for cyclical losses (default 0 0.25 0.5 0.75)",
    )
    parser.add_argument(
        "--bias",
        nargs="+",
        type=float,
        default=[0.1, 0.5, 0.9],
        metavar="P",
        help="what the bias model gives to the target, inside 0 to 1, for debiased focal loss and"
        " product of experts (default 0.1 0.5 0.9)",
    )
    parser.add_argument(
        "--negatives", action="store_true", help="draw target 0 too, dotted (sigmoid losses)"
    )
    parser.add_argument("--log", action="store_true", help="logarithmic vertical axes")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("loss.png"),
        metavar="FILE",
        help="picture to write, .png or .svg (default loss.png)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks."""
    if args.out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {args.out}: expected a name that ends in {' or '.join(FORMATS)}")
    for t in args.progress:
        if not 0 <= t <= 1:
            raise UserError(f"--progress {t:g}: expected numbers from 0 to 1")
    for bias in args.bias:
        if not 0 < bias < 1:
            raise UserError(f"--bias {bias:g}: expected probabilities above 0 and below 1")
    curves = []
    for path in args.configs:
        for kind, settings in losses_of_config(path):
            loss = build_loss(kind, settings)
            keywords = inspect.signature(LOSSES[kind]).parameters
            shown = [
                f"{key}={value}"
                for key, value in settings.items()
                if key == "epsilon" or (value != keywords[key].default and key != "use_sigmoid")
            ]
            name = " ".join([f"{Path(path).stem}: {kind}", *shown])
            curves += curves_of(name, loss, args.progress, args.bias)
    for words in args.loss:
        loss = build_loss(*parse_loss(words))
        curves += curves_of(" ".join(words), loss, args.progress, args.bias)
    if not curves:
        raise UserError("nothing to draw: give a config or --loss TYPE KEY=VALUE ...; see --help")
    draw(curves, args.out, log=args.log, negatives=args.negatives)
    print(f"{args.out}: {len(curves)} curve{'s' if len(curves) > 1 else ''}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv), goes_on_with=None)


if __name__ == "__main__":
    sys.exit(main())
