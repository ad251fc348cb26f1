"""Train over a grid of losses and seeds; draw calibration against curvature against quality.

Every run is one of tools/train.py, then tools/curvature.py twice: on the loss that it was trained
with, and on plain cross-entropy at the same weights. The second is there because a larger gamma
makes the loss itself smaller, and with it every entry of its Hessian, whatever the weights are.

The grid: the focal loss over gamma, with alpha as the RetinaNet paper pairs it and fixed at 0.25
(a softmax loss has no alpha, and one series); Poly-1 over epsilon; and cross-entropy with the
Hessian's trace as a penalty, over its coefficient. Done runs are kept: after an interruption, give
the same command again.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from polyfocal.data.files import replace_text
from polyfocal.errors import UserError
from polyfocal.experiments.study import Outcome, Run, mean_and_spread, run_study, summarize
from polyfocal.mmdet.command_line import run_tool
from polyfocal.mmdet.studies import losses_of

EXAMPLES = """\
examples:
  # a classifier on scikit-learn's digits: a quarter of a minute a run
  python tools/gamma_study.py configs/classification/cross_entropy.py --demo \
      --out work_dirs/gamma_digits

  # CIFAR-10 or -100 from a folder, with and without a long tail
  python tools/gamma_study.py configs/classification/cross_entropy.py --data ~/cifar \
      --profile tiny --out work_dirs/gamma_cifar --cfg-options variant.long_tail=100

  # a detector on the built-in pictures, two values of gamma, one seed: a quarter of an hour
  python tools/gamma_study.py configs/retinanet_focal.py --demo --gammas 0 2 --epsilons \\
      --penalties --seeds 0 --epochs 4 --out work_dirs/gamma_demo

  # the whole grid on your own pictures: hours
  python tools/gamma_study.py configs/retinanet_focal.py --data ~/cells --profile tiny \\
      --out work_dirs/gamma_cells

  # --cfg-options and what follows goes to every run, as with tools/train.py
  python tools/gamma_study.py configs/retinanet_focal.py --data ~/cells --profile tiny \\
      --out work_dirs/gamma_cells --cfg-options train_dataloader.batch_size=8
"""

# Lin et al. 2017, table 1b: the best alpha for each gamma. Between 2 and 5, both 0.25.
PAIRED_ALPHA = {0.0: 0.75, 0.1: 0.75, 0.2: 0.75, 0.5: 0.5, 1.0: 0.25, 2.0: 0.25, 5.0: 0.25}
FIXED_ALPHA = 0.25
GAMMAS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
EPSILONS = (-1.0, -0.5, 1.0, 2.0)
PENALTIES = (1e-5, 1e-4, 1e-3)

# Columns of the tables and axes of the plots: what a run may have measured, and its name.
QUALITY = {"bbox_mAP": "AP", "segm_mAP": "mask AP", "top1": "accuracy"}
CALIBRATION = {
    "ece": "ECE",
    "bbox_D-ECE": "D-ECE",
    "bbox_LaECE": "LaECE",
    "bbox_LaECE_0": "LaECE_0",
    "bbox_LaACE_0": "LaACE_0",
    "bbox_LRP": "LRP",
    "bbox_oLRP": "oLRP",
}
CURVATURE = {
    "trace": "trace",
    "eigenvalue": "largest eigenvalue",
    "trace_ce": "trace (cross-entropy)",
    "eigenvalue_ce": "largest eigenvalue (cross-entropy)",
}
# Okabe and Ito's colours.
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73")
MARKERS = "os^D"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="for instance configs/retinanet_focal.py")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the study")
    parser.add_argument("--data", metavar="DIR", help="as with tools/train.py")
    parser.add_argument("--profile", choices=["tiny"], help="as with tools/train.py")
    parser.add_argument("--demo", action="store_true", help="as with tools/train.py")
    axes = (("--gammas", GAMMAS), ("--epsilons", EPSILONS), ("--penalties", PENALTIES))
    for option, values in axes:
        shown = " ".join(f"{value:g}" for value in values)
        parser.add_argument(
            option,
            type=float,
            nargs="*",
            default=list(values),
            metavar="X",
            help=f"values of the grid, none to leave the series out (default: {shown})",
        )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--epochs", type=int, help="of each run (default: the config's)")
    parser.add_argument("--params", metavar="REGEX", help="as with tools/curvature.py")
    parser.add_argument("--batches", type=int, default=4, help="for the curvature (default: 4)")
    parser.add_argument("--probes", type=int, default=20, help="for the trace (default: 20)")
    parser.add_argument(
        "--penalty-params",
        metavar="REGEX",
        help="parameters over which the trace is penalised (default: as --params)",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="as with tools/train.py"
    )
    return parser.parse_args(argv)


def grid(args: argparse.Namespace, use_sigmoid: bool) -> dict[str, dict[str, Any]]:
    """The runs of one seed by name: loss and penalty, and the place in each series it is in."""
    cells: dict[str, dict[str, Any]] = {}

    def add(series: dict[str, float], name: str, penalty: float = 0.0, **loss: Any) -> None:
        loss = {**loss, "use_sigmoid": use_sigmoid}
        cells[name] = {"series": series, "loss": loss, "penalty": penalty}

    # Where the other series begin: with epsilon 0, and without a penalty.
    no_epsilon = (2.0, FIXED_ALPHA) if use_sigmoid else (0.0, None)
    no_penalty = (0.0, paired_alpha(0.0)) if use_sigmoid else (0.0, None)
    for gamma in args.gammas:
        alphas = (paired_alpha(gamma), FIXED_ALPHA) if use_sigmoid else (None,)
        for alpha in dict.fromkeys(alphas):
            among = {
                "focal": not use_sigmoid,
                "focal, alpha paired": use_sigmoid and alpha == paired_alpha(gamma),
                "focal, alpha fixed": use_sigmoid and alpha == FIXED_ALPHA,
            }
            series = {title: gamma for title, is_in in among.items() if is_in}
            if args.epsilons and (gamma, alpha) == no_epsilon:
                series["Poly-1"] = 0.0
            if args.penalties and (gamma, alpha) == no_penalty:
                series["trace penalty"] = 0.0
            name = f"gamma_{gamma:g}" + (f"_alpha_{alpha:g}" if use_sigmoid else "")
            add(series, name, **focal(gamma, alpha))
    for epsilon in args.epsilons:
        poly = "Poly1FocalLoss" if use_sigmoid else "Poly1CrossEntropyLoss"
        name = f"epsilon_{epsilon:g}"
        add({"Poly-1": epsilon}, name, type=f"polyfocal.{poly}", epsilon=epsilon)
    for coefficient in args.penalties:
        name = f"penalty_{coefficient:g}"
        loss = focal(*no_penalty)
        add({"trace penalty": coefficient}, name, penalty=coefficient, **loss)
    return cells


def focal(gamma: float, alpha: float | None) -> dict[str, Any]:
    """The config of a focal loss."""
    return {"type": "polyfocal.FocalLoss", "gamma": gamma, "alpha": alpha}


def paired_alpha(gamma: float) -> float:
    """Alpha for a gamma as the RetinaNet paper pairs them, the nearest where it has none."""
    return PAIRED_ALPHA[min(PAIRED_ALPHA, key=lambda known: (abs(known - gamma), known))]


class Study:
    """How one cell of the grid is trained and measured, with the options of the command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        if not Path(args.config).is_file():
            raise UserError(f"there is no config {args.config}.")
        self.args = args
        self.places = losses_of(self._config().model)
        parent, key = self.places[0]
        self.use_sigmoid = bool(parent[key].get("use_sigmoid", False))
        self.tools = {name: _tool(name) for name in ("train", "curvature")}
        self.data = ["--demo"] * args.demo
        for option in ("data", "profile"):
            if getattr(args, option) is not None:
                self.data += [f"--{option}", getattr(args, option)]
        self.options = list(args.cfg_options)
        if args.epochs is not None:
            self.options.append(f"train_cfg.max_epochs={args.epochs}")

    def runs(self, cells: dict[str, dict[str, Any]]) -> list[Run]:
        """With the seeds in the outer loop: a study cut short has compared all losses."""
        common = {
            "config": str(self.args.config),
            "data": self.data,
            "options": self.options,
            "params": self.args.params,
            "batches": self.args.batches,
            "probes": self.args.probes,
            "penalty_params": self.args.penalty_params or self.args.params,
        }
        return [
            Run(name, seed, {**common, "loss": cell["loss"], "penalty": cell["penalty"]})
            for seed, (name, cell) in itertools.product(self.args.seeds, cells.items())
        ]

    def measure(self, run: Run, folder: Path) -> dict[str, float]:
        """Train, and read what the evaluation and the curvature tool say."""
        name = f"{run.name}_seed_{run.seed}"
        config = self._write(folder / f"{name}.py", run.settings["loss"], run.settings)
        work = folder / "work"
        arguments = [str(config), *self.data, "--work-dir", str(work), "--seed", str(run.seed)]
        log = folder / "output.txt"
        log.unlink(missing_ok=True)
        self._call("train", [*arguments, "--resume", *self._cfg_options()], log)
        measured = last_evaluation(work)
        checkpoint = (work / "last_checkpoint").read_text().strip()
        plain = {**focal(0.0, None), "use_sigmoid": self.use_sigmoid}
        reference = self._write(folder / f"{name}_ce.py", plain)
        for file, suffix in ((config, ""), (reference, "_ce")):
            out = folder / f"curvature{suffix}.json"
            arguments = [str(file), checkpoint, *self.data, "--work-dir", str(folder / "curvature")]
            arguments += ["--batches", str(self.args.batches), "--probes", str(self.args.probes)]
            if self.args.params is not None:
                arguments += ["--params", self.args.params]
            self._call("curvature", [*arguments, "--out", str(out), *self._cfg_options()], log)
            numbers = json.loads(out.read_text(encoding="utf-8"))
            measured[f"trace{suffix}"] = numbers["trace"]
            measured[f"trace_error{suffix}"] = numbers["trace_error"]
            measured[f"eigenvalue{suffix}"] = numbers["eigenvalues"][0]
            measured[f"loss{suffix}"] = numbers["loss"]
        return measured

    def _config(self) -> Config:
        try:
            return Config.fromfile(self.args.config)
        except Exception as error:  # a config is a program: it can fail in any way
            raise UserError(f"{self.args.config} cannot be read as a config: {error}.") from error

    def _write(
        self, file: Path, loss: dict[str, Any], settings: dict[str, Any] | None = None
    ) -> Path:
        """The config with another loss, and the penalty where the settings have one."""
        cfg = self._config()
        for parent, key in losses_of(cfg.model):
            weight = parent[key].get("loss_weight", 1.0)
            parent[key] = ConfigDict(loss, loss_weight=weight)
        if cfg.val_evaluator.type == "CocoMetric":  # a detector's, which measures AP alone
            cfg.val_evaluator.type = "polyfocal.CalibrationMetric"
        if settings is not None and settings["penalty"]:
            hook = {
                "type": "polyfocal.TracePenaltyHook",
                "coefficient": settings["penalty"],
                "parameters": settings["penalty_params"],
            }
            cfg.custom_hooks = [*cfg.get("custom_hooks", []), hook]
        cfg.dump(file)
        return file

    def _cfg_options(self) -> list[str]:
        return ["--cfg-options", *self.options] if self.options else []

    def _call(self, tool: str, arguments: list[str], log: Path) -> None:
        """Run a tool with what it says in a file; its user's errors are ours."""
        errors = io.StringIO()
        with (
            log.open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(errors),
        ):
            print("$", f"tools/{tool}.py", *arguments, flush=True)
            status = self.tools[tool].main(arguments)
            print(errors.getvalue())
        if status == 130:
            raise KeyboardInterrupt
        if status:
            sentence = errors.getvalue().strip().splitlines()[-1].removeprefix("error: ")
            raise UserError(f"tools/{tool}.py: {sentence}")


def last_evaluation(work: Path) -> dict[str, float]:
    """The numbers of a work directory's last evaluation, without the prefix of their metric."""
    found: dict[str, float] = {}
    for file in sorted(work.glob("*/vis_data/scalars.json")):
        for line in file.read_text(encoding="utf-8").splitlines():
            numbers = {
                key.split("/", 1)[1]: value
                for key, value in json.loads(line).items()
                if "/" in key and not key.startswith("curvature/")
            }
            found = numbers or found
    if not found:
        raise UserError(f"{work} holds no evaluation: the config must evaluate its val split.")
    # NaN is not JSON, and -1 is COCO's word for "no ground truth".
    return {name: v for name, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def columns_of(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The columns of which every run has a number, with their names."""
    known = {**QUALITY, **CALIBRATION, **CURVATURE}
    return {key: name for key, name in known.items() if all(key in o.measured for o in outcomes)}


def write_tables(
    outcomes: Sequence[Outcome], cells: dict[str, dict[str, Any]], folder: Path
) -> None:
    """``table.md``: mean ± spread over the seeds; ``runs.csv``: every run and all its numbers."""
    columns = columns_of(outcomes)

    def cell(key: str, mean: float, spread: float) -> str:
        return _cell(mean, spread, percent=key not in CURVATURE)

    lines = [*_table(" ", columns, outcomes, cell), *rank_correlations(outcomes, cells)]
    replace_text(folder / "table.md", "\n".join(lines) + "\n")
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.measured))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "seed", "seconds", *keys])
    for outcome in outcomes:
        numbers = [outcome.measured.get(key, "") for key in keys]
        writer.writerow([outcome.run.name, outcome.run.seed, round(outcome.seconds), *numbers])
    replace_text(folder / "runs.csv", text.getvalue())


def rank_correlations(outcomes: Sequence[Outcome], cells: dict[str, dict[str, Any]]) -> list[str]:
    """Does calibration go with curvature? Lines of a table: Spearman's rho along each series.

    One rho a seed, over the values of the series, and then mean ± spread over the seeds. 1: the
    flatter, the better calibrated, as the paper has it; -1: the other way round. Series of fewer
    than three values have none.
    """
    from scipy.stats import spearmanr

    columns = columns_of(outcomes)
    curvatures = {key: name for key, name in columns.items() if key in CURVATURE}
    measures = [key for key in CALIBRATION if key in columns]
    series = {title: names for title, names in series_of(cells).items() if len(names) >= 3}
    measured = {(o.run.name, o.run.seed): o.measured for o in outcomes}
    seeds = dict.fromkeys(o.run.seed for o in outcomes)

    def rho(names: Sequence[str], seed: int, *keys: str) -> float:
        return spearmanr(*([measured[name, seed][key] for name in names] for key in keys)).statistic

    rhos = [
        Outcome(
            Run(f"{title}: {columns[measure]}", seed),
            {key: rho(names, seed, key, measure) for key in curvatures},
            0.0,
        )
        for (title, names), measure, seed in itertools.product(series.items(), measures, seeds)
    ]
    if not rhos:
        return []

    def cell(_: str, mean: float, spread: float) -> str:
        return mean_and_spread(mean, spread, digits=2, sign="+")

    return ["", *_table(" rank correlation with ", curvatures, rhos, cell)]


def _table(
    corner: str,
    columns: dict[str, str],
    outcomes: Sequence[Outcome],
    cell: Callable[[str, float, float], str],
) -> list[str]:
    """The lines of a Markdown table: the summary, with ``cell`` of a column, mean and spread."""
    lines = [f"|{corner}| {' | '.join(columns.values())} |", f"|---{'|---:' * len(columns)}|"]
    for name, row in summarize(outcomes).items():
        lines.append(f"| {name} | {' | '.join(cell(key, *row[key]) for key in columns)} |")
    return lines


def series_of(cells: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The names of the cells of each series, in the order of their values."""
    series: dict[str, list[str]] = {}
    for name, cell in cells.items():
        for one in cell["series"]:
            series.setdefault(one, []).append(name)
    for one, names in series.items():
        names.sort(key=lambda name: cells[name]["series"][one])
    return series


def draw(outcomes: Sequence[Outcome], cells: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """One picture a measure of calibration: against curvature and quality, a line a series."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, summary = columns_of(outcomes), summarize(outcomes)
    quality = next((key for key in QUALITY if key in columns), None)
    series = series_of(cells)
    measures = [key for key in CALIBRATION if key in columns] or ([quality] if quality else [])
    files = []
    for measure in measures:
        across = [*CURVATURE, *([quality] if quality and quality != measure else [])]
        figure, axes = plt.subplots(1, len(across), figsize=(3.6 * len(across), 3.4), sharey=True)
        for axis, key in zip(axes, across, strict=True):
            for (label, names), color, marker in zip(series.items(), COLORS, MARKERS, strict=False):
                points = [(summary[name][key], summary[name][measure]) for name in names]
                (x, dx), (y, dy) = (zip(*(p[i] for p in points), strict=True) for i in (0, 1))
                errors = {"xerr": _bars(dx), "yerr": _bars(dy)}
                axis.errorbar(
                    x, y, **errors, label=label, color=color, marker=marker, lw=1, capsize=2
                )
                for name, a, b in zip(names, x, y, strict=True):
                    text = f"{cells[name]['series'][label]:g}"
                    axis.annotate(
                        text, (a, b), (4, 4), textcoords="offset points", fontsize=7, color=color
                    )
            means = [summary[name][key][0] for name in summary]
            if min(means) > 0 and max(means) > 20 * min(means):
                axis.set_xscale("log")
            axis.set_xlabel(columns[key])
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(columns[measure])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(series), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.92))
        file = folder / f"{measure}.svg"
        figure.savefig(folder / f".{file.name}", format="svg", metadata={"Date": None})
        os.replace(folder / f".{file.name}", file)
        plt.close(figure)
        files.append(file)
    return files


def run(args: argparse.Namespace) -> None:
    """Run the study with the options of the command line."""
    if args.demo and args.data:
        raise UserError("--demo is the built-in data set and --data another one: give one of them.")
    if any(coefficient <= 0 for coefficient in args.penalties):
        raise UserError(f"--penalties takes numbers above 0, got {min(args.penalties):g}.")
    if any(gamma < 0 for gamma in args.gammas):
        raise UserError(f"--gammas takes numbers of 0 or more, got {min(args.gammas):g}.")
    study = Study(args)
    cells = grid(args, study.use_sigmoid)
    if not cells:
        raise UserError("the grid is empty: give --gammas, --epsilons or --penalties a value.")
    folder = Path(args.out)
    outcomes = run_study(
        study.runs(cells), study.measure, folder, lambda line: print(line, flush=True)
    )
    write_tables(outcomes, cells, folder)
    files = [folder / "table.md", folder / "runs.csv", *draw(outcomes, cells, folder)]
    print("\n" + (folder / "table.md").read_text(encoding="utf-8"))
    print("written:", *files)


def _cell(mean: float, spread: float, *, percent: bool) -> str:
    if percent:
        return mean_and_spread(100 * mean, 100 * spread)
    digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 0  # three that count
    return mean_and_spread(mean, spread, digits)


def _bars(spreads: Sequence[float]) -> list[float]:
    return [0.0 if math.isnan(spread) else spread for spread in spreads]


def _tool(name: str) -> Any:
    """A command line beside this one, as a module."""
    file = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"polyfocal_tool_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv), goes_on_with="the same command")


if __name__ == "__main__":
    sys.exit(main())
