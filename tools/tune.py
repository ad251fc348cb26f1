"""Search the settings of a config's loss on your data: epsilon, gamma, alpha and the others.

Every loss declares what is worth a search, and where. A trial is a short training on four fifths of
the training split, judged by the other fifth, and given up early where it lags behind. Then the
best setting, the config's own and those of --against are trained in full length with fresh seeds
and measured on the val split, which the search has not used. The folder gets best.py, a config
ready to train; report.md, the evidence; and search.db, by which the same command goes on after an
interruption.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from polyfocal.data.files import replace_text
from polyfocal.errors import UserError
from polyfocal.experiments.study import (
    Difference,
    Outcome,
    Run,
    markdown_table,
    paired_difference,
    run_study,
    study_table,
)
from polyfocal.mmdet.command_line import add_experiment_options, run_tool
from polyfocal.mmdet.experiment import read_config
from polyfocal.mmdet.tuning import (
    DONE,
    Setting,
    Tuning,
    open_study,
    rounded,
    searched_seconds,
    write_config,
)

EXAMPLES = """\
examples:
  # a classifier on the built-in digits, a minute
  python tools/tune.py configs/classification/poly1.py --demo --trials 20

  # a detector on your pictures, 40 minutes of searching; then 3 seeds beside stock focal loss
  python tools/tune.py configs/retinanet_poly1.py --data ~/cells --profile tiny --minutes 40 \\
      --against configs/retinanet_focal.py

  # epsilon alone, in trials of 3 epochs
  python tools/tune.py configs/retinanet_poly1.py --data ~/cells --profile tiny --minutes 40 \\
      --only epsilon --epochs 3

  # four processes, each on a GPU of its own where there are as many
  python tools/tune.py configs/retinanet_poly1.py --data ~/cells --minutes 600 --workers 4

  # one more process on the same search, from another shell: the same command, and --seeds 0
"""

CONFIG_ROW = "config"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="for instance configs/retinanet_poly1.py")
    add_experiment_options(parser)
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="of searching, earlier starts of the same command included; a trial under way then is "
        "ended and counts for nothing",
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="to search for, whether finished or given up early"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="of a trial (default: a third of the config's)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="search these settings, not all")
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="of the trainings in full length (default: 3); 0 for a search alone",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="CONFIG",
        help="train these too in full length, such as configs/retinanet_focal.py",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that search (default: 1)"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Search, train the best, and write what was found."""
    _check(args)
    folder = Path(args.work_dir or Path("work_dirs") / "tune" / Path(args.config).stem)
    tuning = Tuning(
        config=Path(args.config),
        folder=folder,
        data=args.data,
        tiny=args.profile == "tiny",
        demo=args.demo,
        options=args.cfg_options or {},
        epochs=args.epochs,
        only=args.only,
    )
    experiment = tuning.prepare()
    settings = tuning.settings(experiment)
    columns = experiment.quality
    identity = {
        **_conditions(args),
        **_content(tuning.config),
        "epochs": tuning.trial_epochs(experiment.config),
    }
    study = open_study(folder, settings, identity)
    say = partial(print, flush=True)
    say(f"* search of {', '.join(settings)} in trials of {identity['epochs']} epochs")
    _search(args, tuning, study, settings, columns[0], say)
    best = best_trial(study)
    say(f"* best: {_trial_line(best, columns[0])}")
    if args.seeds == 0:
        return
    values = rounded(best.params)
    own = rounded({name: setting.value for name, setting in settings.items()})
    row = CONFIG_ROW if values == own else f"trial_{best.number}"
    if best.value == 0:
        raise UserError(
            f"no trial has learned anything in its {identity['epochs']} epochs: give more "
            "--epochs, and another --work-dir."
        )
    outcomes = _train_in_full(args, tuning, row, values, columns, say)
    scale = experiment.per_cent
    sentences = verdict(outcomes, row, columns[0], scale)
    report = folder / "report.md"
    write_config(
        folder / "best.py",
        tuning.config,
        values,
        [f"{Path(args.config).name} with the loss that tools/tune.py found best.", *sentences],
    )
    command = ["python tools/train.py", str(folder / "best.py"), *_data_options(args)]
    shown = [c for c in columns if all(c in outcome.measured for outcome in outcomes)]
    table = markdown_table(outcomes, shown, scale=scale)
    write_report(report, study, settings, [*table, "", *(f"- {s}" for s in sentences)], args)
    _draw(study, columns[0], folder / "search.png")
    console = Console()
    console.print(study_table(outcomes, shown, scale=scale))
    console.print("on the val split, in per cent, mean ± deviation over the seeds")
    for sentence in sentences:
        console.print(sentence, highlight=False)
    for name, value in {"evidence": report, "train it": " ".join(command)}.items():
        console.print(f"{name:11}{value}", highlight=False, soft_wrap=True)


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The finished trial of the highest score.

    Raises:
        UserError: None has finished.
    """
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        raise UserError(
            "no trial has come to its end: give more --minutes, or trials of fewer --epochs."
        )
    return study.best_trial


def verdict(outcomes: Sequence[Outcome], best: str, column: str, scale: float = 100.0) -> list[str]:
    """What the trainings in full length say of the best setting, a sentence a row it is beside.

    Args:
        outcomes: Of all rows.
        best: Name of the row of the best setting.
        column: The number to compare.
        scale: What makes per cent of it.
    """
    others = [name for name in dict.fromkeys(o.run.name for o in outcomes) if name != best]
    sentences = []
    if best == CONFIG_ROW:
        sentences.append("The search found nothing better than the config's own setting.")
    for other in others:
        difference = paired_difference(outcomes, best, other, column)
        sentences.append(_compared(difference, best, other, column, scale))
    return sentences


def _compared(d: Difference, best: str, other: str, column: str, scale: float) -> str:
    ahead = "ahead of" if d.mean >= 0 else "behind"
    text = f"{best} is {abs(scale * d.mean):.1f} {column} {ahead} {other}"
    if d.seeds == 1:
        return f"WARNING: {text} with one seed, which tells nothing of the seeds' noise."
    text += f", ± {scale * d.spread:.1f} over {d.seeds} seeds, paired t-test p = {d.p:.2g}"
    if d.is_noise:
        return f"WARNING: {text}: within the seeds' noise."
    return f"{text}." if d.mean > 0 else f"WARNING: {text}: do not take it."


def write_report(
    file: Path,
    study: optuna.Study,
    settings: dict[str, Setting],
    comparison: Sequence[str],
    args: argparse.Namespace,
) -> None:
    """The evidence as Markdown: the comparison on val, as lines, and every trial."""
    trials = study.get_trials(deepcopy=False, states=DONE)
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    epochs = study.user_attrs["identity"]["epochs"]
    lines = [
        f"# The loss of {Path(args.config).name}, tuned",
        "",
        f"{len(trials)} trials of {epochs} epochs, {pruned} of them given up early, in "
        f"{searched_seconds(study) / 60:.0f} minutes. They were trained on four fifths of the "
        "training split and judged by the other fifth. The first is the config's own setting.",
        "",
        "## In full length, on the val split",
        "",
        f"{args.seeds} seeds; in per cent, mean ± deviation over the seeds.",
        "",
        *comparison,
        "",
        "## Trials",
        "",
        f"| trial | {' | '.join(settings)} | epochs | score | seconds |",
        "|---:" * (len(settings) + 4) + "|",
    ]
    for trial in trials:
        values = rounded(trial.params)
        cells = [trial.number, *(f"{values[name]:g}" for name in settings), trial.last_step]
        cells += [_score(trial), f"{trial.user_attrs['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    replace_text(file, "\n".join(lines) + "\n")


def _check(args: argparse.Namespace) -> None:
    if args.demo and args.data:
        raise UserError("--demo is the built-in data set and --data another one: give one of them.")
    if args.minutes is None and args.trials is None:
        raise UserError("a search needs a budget: give --minutes M, --trials N or both.")
    for name, least in (("minutes", None), ("trials", 1), ("workers", 1), ("seeds", 0)):
        value = getattr(args, name)
        if value is not None and (value <= 0 if least is None else value < least):
            expected = "more than 0" if least is None else f"{least} or more"
            raise UserError(f"--{name} {value:g}: expected {expected}.")


def _data_options(args: argparse.Namespace) -> list[str]:
    """The options by which other tools train on the same data in the same way."""
    options = ["--demo"] * args.demo
    for name in ("data", "profile"):
        if getattr(args, name) is not None:
            options += [f"--{name}", shlex.quote(getattr(args, name))]
    if args.cfg_options:
        pairs = [f"{key}={value}" for key, value in args.cfg_options.items()]
        options += ["--cfg-options", *map(shlex.quote, pairs)]
    return options


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What every training of a search depends on beside its config."""
    return {
        "data": None if args.data is None else str(Path(args.data).resolve()),
        "demo": args.demo,
        "profile": args.profile,
        "options": {key: str(value) for key, value in (args.cfg_options or {}).items()},
    }


def _content(config: Path) -> dict[str, str]:
    """A config, with its bases: where it is, and a hash of what it says."""
    text = read_config(config).pretty_text
    return {
        "config": str(config.resolve()),
        "content": hashlib.sha256(text.encode()).hexdigest(),
    }


def _search(
    args: argparse.Namespace,
    tuning: Tuning,
    study: optuna.Study,
    settings: dict[str, Setting],
    metric: str,
    say: Any,
) -> None:
    workers = [_start_worker(args, number) for number in range(1, args.workers)]
    try:
        tuning.search(
            study,
            settings,
            seed=0,
            minutes=args.minutes,
            trials=args.trials,
            report=lambda trial: say(_trial_line(trial, metric)),
        )
        for worker in workers:
            if worker.wait() != 0:
                raise UserError(f"one of the --workers ended with status {worker.returncode}.")
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()


def _start_worker(args: argparse.Namespace, number: int) -> subprocess.Popen:
    command = [sys.executable, __file__, *args.argv, "--workers", "1", "--seeds", "0"]
    environment = dict(os.environ)
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        mine = number % count
        environment["CUDA_VISIBLE_DEVICES"] = visible[mine] if visible[0] else str(mine)
    return subprocess.Popen(command, env=environment)


def _train_in_full(
    args: argparse.Namespace,
    tuning: Tuning,
    row: str,
    values: dict[str, float],
    columns: Sequence[str],
    say: Any,
) -> list[Outcome]:
    rows: dict[str, tuple[Path, dict[str, float]]] = {CONFIG_ROW: (tuning.config, {})}
    rows.setdefault(row, (tuning.config, values))
    for other in map(Path, args.against):
        if other.stem in rows:
            raise UserError(f"--against {other}: there is a row {other.stem} already.")
        rows[other.stem] = (other, {})
    settings = {
        name: {**_conditions(args), **_content(config), "values": found}
        for name, (config, found) in rows.items()
    }
    # The trials had seed 0: these are fresh.
    runs = [Run(name, seed, settings[name]) for seed in range(1, args.seeds + 1) for name in rows]

    def measure(run: Run, place: Path) -> dict[str, float]:
        config, found = rows[run.name]
        measured = tuning.train(place, seed=run.seed, config=config, values=found)
        return {name: measured[name] for name in columns if name in measured}

    say(f"* {len(runs)} trainings in full length, evaluated on the val split")
    return run_study(runs, measure, tuning.folder, say)


def _trial_line(trial: FrozenTrial, metric: str) -> str:
    values = "  ".join(f"{name} {value:g}" for name, value in rounded(trial.params).items())
    return f"trial {trial.number}: {values}: {metric} {_score(trial)}  ({_seconds(trial)} s)"


def _score(trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.3f}"
    if trial.state == TrialState.PRUNED and trial.last_step is not None:
        return f"{trial.intermediate_values[trial.last_step]:.3f}, given up after {trial.last_step}"
    return "none, ended with the time; it comes first when the search goes on"


def _seconds(trial: FrozenTrial) -> str:
    return f"{trial.user_attrs.get('seconds', 0):.0f}"


def _draw(study: optuna.Study, metric: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization.matplotlib import plot_slice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called experimental
        plot_slice(study, target_name=metric)
    partial_file = file.with_name(f".{file.name}")
    plt.savefig(partial_file, format="png", dpi=100, bbox_inches="tight")
    plt.close("all")
    os.replace(partial_file, file)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    args = parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return run_tool(run, args, goes_on_with="the same command")


if __name__ == "__main__":
    sys.exit(main())
