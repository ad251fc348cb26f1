"""Measure how curved the training loss is at a checkpoint: eigenvalues, trace, spectrum.

The Hessian of the classification loss over the parameters of the classification branch, unless
--params and --loss say otherwise. Use the same --data, --profile or --demo as in training: they
decide what the model looks like and which pictures the loss is taken of.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from polyfocal.adapters import prepare
from polyfocal.curvature import SpectralDensity
from polyfocal.errors import UserError
from polyfocal.experiments.command_line import add_common_options, request_of, run_tool
from polyfocal.mmengine.curvature import Curvature
from polyfocal.mmengine.runs import curvature

EXAMPLES = """\
examples:
  # what the demo trained: seconds on a CPU
  python tools/curvature.py configs/retinanet_poly1.py work_dirs/retinanet_poly1/epoch_12.pth --demo

  # five eigenvalues, a better trace, the spectrum as a picture
  python tools/curvature.py configs/retinanet_poly1.py epoch_12.pth --demo \\
      --top-k 5 --probes 60 --method hutch++ --out curvature.json --plot spectrum.svg

  # the last layer only; then the whole detector and all its losses
  python tools/curvature.py configs/retinanet_poly1.py epoch_12.pth --demo --params retina_cls
  python tools/curvature.py configs/retinanet_poly1.py epoch_12.pth --demo --params . --loss all

  # the same weights under another loss, so that two trainings are measured alike
  python tools/curvature.py configs/retinanet_poly1.py epoch_12.pth --demo \\
      --cfg-options model.bbox_head.loss_cls.epsilon=0 model.bbox_head.loss_cls.gamma=0
"""

FORMATS = (".png", ".svg")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the config it was trained with")
    parser.add_argument("checkpoint", help="for instance work_dirs/retinanet_poly1/epoch_12.pth")
    add_common_options(parser)
    parser.add_argument(
        "--params",
        metavar="REGEX",
        help="parameters whose names match (default: the classification branch of a detector, "
        "else the whole model)",
    )
    parser.add_argument(
        "--loss",
        choices=["cls", "all"],
        help="the losses called cls, or the whole training loss (default: cls, where there is one)",
    )
    parser.add_argument("--top-k", type=int, default=1, help="largest eigenvalues (default: 1)")
    parser.add_argument(
        "--steps", type=int, default=100, help="most products for them (default: 100)"
    )
    parser.add_argument(
        "--probes", type=int, default=16, help="products for the trace (default: 16)"
    )
    parser.add_argument(
        "--method",
        choices=["hutchinson", "hutch++"],
        default="hutchinson",
        help="how the trace is estimated (default: hutchinson)",
    )
    parser.add_argument(
        "--batches", type=int, default=4, help="batches of training pictures (default: 4)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the pictures and the probes (default: 0)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the numbers to NAME.json")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the spectral density into NAME.png or NAME.svg"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Measure with the options of the command line."""
    _check_name("--out", args.out, (".json",))
    _check_name("--plot", args.plot, FORMATS)
    experiment = request_of(args, prepare, train=True).prepare()
    experiment.set_up(args.work_dir, args.launcher, args.local_rank)
    measured = curvature(
        experiment,
        args.checkpoint,
        batches=args.batches,
        seed=args.seed,
        parameters=args.params,
        kind=args.loss,
        top_k=args.top_k,
        steps=args.steps,
        probes=args.probes,
        method=args.method,
        density=args.plot is not None,
    )
    _print(measured, args)
    if args.plot is not None:
        assert measured.density is not None
        draw(measured.density, Path(args.plot))
    if args.out is not None:
        numbers = as_numbers(measured)
        numbers["settings"] = {
            name: getattr(args, name)
            for name in ("config", "checkpoint", "batches", "probes", "method", "seed")
        }
        partial = Path(f"{args.out}.partial")
        partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, args.out)


def as_numbers(measured: Curvature) -> dict[str, Any]:
    """What --out writes."""
    numbers: dict[str, Any] = {
        "parameters": list(measured.parameters),
        "size": measured.size,
        "loss": measured.loss,
        "eigenvalues": measured.eigenvalues.values.tolist(),
        "eigenvalue_errors": measured.eigenvalues.errors.tolist(),
        "steps": measured.eigenvalues.steps,
        "trace": measured.trace.value,
        "trace_error": measured.trace.standard_error,
        "seconds": measured.seconds,
    }
    if measured.density is not None:
        numbers["density"] = {
            field.name: getattr(measured.density, field.name).tolist()
            for field in dataclasses.fields(measured.density)
        }
    return numbers


def draw(density: SpectralDensity, file: Path) -> None:
    """The spectral density on a logarithmic scale, smoothed by a hundredth of its width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, high = float(density.values.min()), float(density.values.max())
    width = max(high - low, abs(high), 1e-12) / 100
    grid = torch.linspace(low - 5 * width, high + 5 * width, 1000, dtype=torch.float64)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.semilogy(grid, density.smooth(grid, width).clamp(min=1e-9 / width), color="#0072B2")
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.set_ylim(bottom=1e-7 / width)
    axes.grid(alpha=0.3)
    partial = file.with_suffix(f".partial{file.suffix}")
    figure.savefig(partial, dpi=150)
    plt.close(figure)
    os.replace(partial, file)


def _check_name(option: str, name: str | None, endings: tuple[str, ...]) -> None:
    if name is None:
        return
    if Path(name).suffix not in endings:
        raise UserError(f"{option} takes a name that ends in {' or '.join(endings)}, got {name}.")
    if not Path(name).absolute().parent.is_dir():
        raise UserError(f"{option}: there is no folder {Path(name).parent}.")


def _print(measured: Curvature, args: argparse.Namespace) -> None:
    table = Table(title=f"Hessian over {measured.size:,} parameters", title_justify="left")
    for name, justify in (("", "left"), ("value", "right"), ("±", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    values, errors = measured.eigenvalues.values.tolist(), measured.eigenvalues.errors.tolist()
    for number, (value, error) in enumerate(zip(values, errors, strict=True), start=1):
        table.add_row(f"eigenvalue {number}", f"{value:.5g}", f"{error:.1g}")
    table.add_row("trace", f"{measured.trace.value:.5g}", f"{measured.trace.standard_error:.2g}")
    table.add_row("loss", f"{measured.loss:.5g}", "")
    console = Console()
    console.print(table)
    first, *_, last = (*measured.parameters, measured.parameters[-1])
    lines = {
        "parameters": f"{first} ... {last}" if first != last else first,
        "time": f"{measured.seconds:.1f} s, {measured.eigenvalues.steps} products for eigenvalues",
        "numbers": args.out,
        "spectrum": args.plot,
    }
    for name, line in lines.items():
        if line is not None:
            console.print(f"{name:12}{line}", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
