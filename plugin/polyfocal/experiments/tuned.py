"""A whole search: trials in several processes, trainings in full length, a report."""

import os
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from polyfocal.data.files import write_text, written_whole
from polyfocal.errors import UserError
from polyfocal.experiments.report import Table, summary_table
from polyfocal.experiments.request import Request, Setting, recipe
from polyfocal.experiments.study import (
    Difference,
    Outcome,
    Run,
    paired_difference,
    run_study,
)
from polyfocal.experiments.tuning import (
    DONE,
    Tuning,
    open_study,
    rounded,
    searched_seconds,
    storage_errors,
)

CONFIG_ROW = "config"
_TAKEN = rf"{CONFIG_ROW}|trial_\d+|trials|split"


@dataclass(frozen=True)
class Budget:
    """How much is done; at least one of minutes and trials is given.

    Attributes:
        minutes: Minutes of the search, earlier starts included.
        trials: Number of trials, whether finished or given up early.
        seeds: Seeds of the trainings in full length; 0 for only the search.
        workers: Number of processes that search.

    Raises:
        UserError: There is no budget, or a number is out of range.
    """

    minutes: float | None = None
    trials: int | None = None
    seeds: int = 3
    workers: int = 1

    def __post_init__(self) -> None:
        if self.minutes is None and self.trials is None:
            raise UserError("a search needs a budget: give --minutes M, --trials N or both.")
        for name, least in (("minutes", None), ("trials", 1), ("workers", 1), ("seeds", 0)):
            value = getattr(self, name)
            if value is not None and (value <= 0 if least is None else value < least):
                expected = "more than 0" if least is None else f"{least} or more"
                raise UserError(f"--{name} {value:g}: expected {expected}.")


def tune(
    tuning: Tuning, budget: Budget, *, against: Sequence[str] = (), worker: Sequence[str] = ()
) -> None:
    """Search, train the best, and write what was found.

    Args:
        tuning: What is tuned.
        budget: How much is done.
        against: Configs to train in full length too.
        worker: The command that searches with the same settings, without ``--workers``.

    Raises:
        UserError: The config, the data or the folder does not fit.
    """
    with storage_errors(tuning.folder, tuning.storage):
        _tune(tuning, budget, against, worker)


def _tune(tuning: Tuning, budget: Budget, against: Sequence[str], worker: Sequence[str]) -> None:
    request, folder = tuning.request, tuning.folder
    experiment = request.prepare()
    settings, columns, epochs = tuning.settings, experiment.quality, tuning.trial_epochs
    identity = {**_conditions(request), **_content(request), "epochs": epochs}
    others = _other_rows(request, against) if budget.seeds else {}
    study = open_study(folder, settings, identity, tuning.storage)
    say = partial(print, flush=True)
    say(f"* search of {', '.join(settings)} in trials of {epochs} epochs")
    _search(tuning, study, budget, worker, lambda trial: say(trial_line(trial, columns[0])))
    best = best_trial(study)
    say(f"* best: {trial_line(best, columns[0])}")
    if budget.seeds == 0:
        return
    if best.value == 0:
        raise UserError(
            f"no trial has learned anything in its {epochs} epochs: give more --epochs, and "
            "another --work-dir."
        )
    values = tuning.values_of(best.params)
    own = {name: setting.value for name, setting in settings.items()}
    row = CONFIG_ROW if values == own else f"trial_{best.number}"
    outcomes = _train_in_full(tuning, row, values, others, budget.seeds, columns, say)
    scale = experiment.per_cent
    sentences = verdict(outcomes, row, columns[0], scale)
    name = Path(request.config).name
    title = f"{name} with the loss that polyfocal tune found best."
    doubt = unproven(outcomes, row, columns[0]) if request.freeze and row != CONFIG_ROW else None
    if doubt is not None:
        values, title = own, f"{name} with its own loss."
        sentences.append(doubt)
    experiment.write_variant(folder / "best.py", values, [title, *sentences])
    shown = [c for c in columns if all(c in outcome.measured for outcome in outcomes)]
    table = summary_table(outcomes, {name: name for name in shown}, scale=scale)
    report = folder / "report.md"
    comparison = [table.markdown(), "", *(f"- {sentence}" for sentence in sentences)]
    write_report(report, study, name, list(settings), comparison, budget.seeds)
    _draw(study, columns[0], folder / "search.png")
    console = Console()
    console.print(table.console())
    console.print("on the val split, in per cent, mean ± deviation over the seeds")
    for sentence in sentences:
        console.print(sentence, highlight=False)
    command = " ".join(
        ["polyfocal train", str(folder / "best.py"), *_data_options(request, settings)]
    )
    for label, value in {"evidence": report, "train it": command}.items():
        console.print(f"{label:11}{value}", highlight=False, soft_wrap=True)


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
    """What the trainings in full length say about the best setting, a sentence per other row.

    Args:
        outcomes: The outcomes of all rows.
        best: The row of the best setting.
        column: The number to compare.
        scale: The factor from that number to per cent.
    """
    others = [name for name in dict.fromkeys(o.run.name for o in outcomes) if name != best]
    sentences = []
    if best == CONFIG_ROW:
        sentences.append("The search found nothing better than the config's own setting.")
    for other in others:
        difference = paired_difference(outcomes, best, other, column)
        sentences.append(_compared(difference, best, other, column, scale))
    return sentences


def unproven(outcomes: Sequence[Outcome], best: str, column: str) -> str | None:
    """Why the config keeps its own setting; None if the best one has beaten it.

    Args:
        outcomes: Outcomes of the trainings in full length.
        best: Name of the row of the best setting.
        column: The number to compare.
    """
    difference = paired_difference(outcomes, best, CONFIG_ROW, column)
    if difference.mean > 0 and not difference.is_noise:
        return None
    reason = "it is not ahead" if difference.mean <= 0 else "its lead may be the seeds' noise"
    return f"best.py has the config's own setting and not that of {best}, since {reason}."


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
    name: str,
    settings: Sequence[str],
    comparison: Sequence[str],
    seeds: int,
) -> None:
    """The evidence as Markdown: the comparison on val, as lines, and every trial."""
    trials = study.get_trials(deepcopy=False, states=DONE)
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    identity = study.user_attrs["identity"]
    epochs = identity["epochs"]
    own = rounded({name: found[0] for name, found in identity["settings"].items()})
    first = next((trial.number for trial in trials if rounded(trial.params) == own), None)
    whose = "No trial" if first is None else f"Trial {first}"
    lines = [
        f"# The loss of {name}, tuned",
        "",
        f"{len(trials)} trials of {epochs} epochs, {pruned} of them given up early, in "
        f"{searched_seconds(study) / 60:.0f} minutes. They were trained on four fifths of the "
        f"training split and judged by the other fifth. {whose} has the config's own setting.",
        "",
        "## In full length, on the val split",
        "",
        f"{seeds} seeds; in per cent, mean ± deviation over the seeds.",
        "",
        *comparison,
        "",
        "## Trials",
        "",
    ]
    rows = []
    for trial in trials:
        values = rounded(trial.params)
        cells = [trial.number, *(f"{values[name]:g}" for name in settings), trial.last_step]
        cells += [_score(trial), f"{trial.user_attrs['seconds']:.0f}"]
        rows.append(list(map(str, cells)))
    header = ("trial", *settings, "epochs", "score", "seconds")
    lines.append(Table(header, rows, text_columns=0).markdown())
    write_text(file, "\n".join(lines) + "\n")


def trial_line(trial: FrozenTrial, metric: str) -> str:
    """A trial in one line: its settings, its score, its time."""
    values = "  ".join(f"{name} {value:g}" for name, value in rounded(trial.params).items())
    seconds = trial.user_attrs.get("seconds", 0)
    return f"trial {trial.number}: {values}: {metric} {_score(trial)}  ({seconds:.0f} s)"


def _score(trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.3f}"
    if trial.state == TrialState.PRUNED and trial.last_step is not None:
        return f"{trial.intermediate_values[trial.last_step]:.3f}, given up after {trial.last_step}"
    return "none, ended with the time; it comes first when the search goes on"


def _data_options(request: Request, settings: Mapping[str, Setting]) -> list[str]:
    """The options by which other tools train on the same data in the same way.

    Overrides of what was searched are not among them: ``best.py`` has what was found.
    """
    searched = [f"{option}." for setting in settings.values() for option in setting.options]
    options = ["--demo"] * request.demo
    if request.data is not None:
        options += ["--data", shlex.quote(str(request.data))]
    if request.profile:
        options += ["--profile", request.profile]
    options += ["--freeze"] * request.freeze
    pairs = [
        f"{key}={value}"
        for key, value in request.options.items()
        if not any(option.startswith(f"{key}.") for option in searched)
    ]
    if pairs:
        options += ["--cfg-options", *map(shlex.quote, pairs)]
    return options


def _conditions(request: Request) -> dict[str, Any]:
    """What every training of a search depends on beside its config."""
    return {
        "data": None if request.data is None else str(Path(request.data).resolve()),
        "demo": request.demo,
        "profile": request.profile,
        **recipe(request.profile),
        **({"freeze": True} if request.freeze else {}),
        "options": {key: str(value) for key, value in request.options.items()},
        **({"annotations": request.annotations} if request.annotations else {}),
    }


def _content(request: Request) -> dict[str, str]:
    """A config, with its bases: where it is, and a hash of what it says."""
    return {
        "config": str(Path(request.config).resolve()),
        "content": request.prepare().content(),
    }


def _search(
    tuning: Tuning,
    study: optuna.Study,
    budget: Budget,
    worker: Sequence[str],
    report: Callable[[FrozenTrial], None],
) -> None:
    workers = [_start_worker(worker, number) for number in range(1, budget.workers)]
    try:
        tuning.search(study, seed=0, minutes=budget.minutes, trials=budget.trials, report=report)
        for process in workers:
            if process.wait() != 0:
                raise UserError(f"one of the --workers ended with status {process.returncode}.")
    finally:
        for process in workers:
            process.terminate()
            process.wait()


def _start_worker(command: Sequence[str], number: int) -> subprocess.Popen:
    environment = dict(os.environ)
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        mine = number % count
        environment["CUDA_VISIBLE_DEVICES"] = visible[mine] if visible[0] else str(mine)
    return subprocess.Popen([*command, "--workers", "1", "--seeds", "0"], env=environment)


def _other_rows(request: Request, against: Sequence[str]) -> dict[str, Request]:
    """The rows of ``--against``, looked at before the search and not hours later.

    Raises:
        UserError: A config is not usable, or a row has the name of another one or of a folder.
    """
    rows: dict[str, Request] = {}
    for other in map(Path, against):
        if other.stem in rows or re.fullmatch(_TAKEN, other.stem):
            raise UserError(
                f"--against {other}: there is a row or a folder {other.stem} already: give the "
                "file another name."
            )
        rows[other.stem] = replace(request, config=other)
        rows[other.stem].prepare()
    return rows


def _train_in_full(
    tuning: Tuning,
    row: str,
    values: dict[str, float],
    others: Mapping[str, Request],
    seeds: int,
    columns: Sequence[str],
    say: Callable[[str], None],
) -> list[Outcome]:
    rows: dict[str, tuple[Request, dict[str, float]]] = {CONFIG_ROW: (tuning.request, {})}
    rows.setdefault(row, (tuning.request, values))
    rows |= {name: (request, {}) for name, request in others.items()}
    settings = {
        name: {**_conditions(request), **_content(request), "values": found}
        for name, (request, found) in rows.items()
    }
    # The trials had seed 0: these are fresh.
    runs = [Run(name, seed, settings[name]) for seed in range(1, seeds + 1) for name in rows]

    def measure(run: Run, place: Path) -> dict[str, float]:
        request, found = rows[run.name]
        experiment = request.prepare()
        experiment.use_values(found)
        measured = experiment.measure(place, seed=run.seed, resume=True)
        return {name: measured[name] for name in columns if name in measured}

    say(f"* {len(runs)} trainings in full length, evaluated on the val split")
    return run_study(runs, measure, tuning.folder, say)


def _draw(study: optuna.Study, metric: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.visualization.matplotlib import plot_slice

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is called experimental
        plot_slice(study, target_name=metric)
    with written_whole(file) as part:
        plt.savefig(part, dpi=100, bbox_inches="tight")
    plt.close("all")
