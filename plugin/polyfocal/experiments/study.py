"""Studies: one measurement over a grid of settings and seeds, and its table. Framework-free.

A study is a folder. Every run that has finished leaves ``<name>/seed_<n>/result.json`` in it, with
the settings it had and what it measured; a study that is started again does what is missing.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from polyfocal.data.files import replace_text
from polyfocal.errors import UserError

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Run:
    """One cell of the grid.

    Attributes:
        name: Of the settings: a row of the table, and a folder.
        seed: Of everything random in the run.
        settings: What decides the result beside the seed, of JSON's kinds. A result that was
            measured with other settings is not taken.
    """

    name: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def folder(self, study: str | Path) -> Path:
        """Where in the study's folder the run keeps its files."""
        return Path(study) / self.name / f"seed_{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and how many seconds it took."""

    run: Run
    measured: dict[str, float]
    seconds: float


def run_study(
    runs: Sequence[Run],
    measure: Callable[[Run, Path], dict[str, float]],
    folder: str | Path,
    report: Callable[[str], None] = print,
    *,
    shown: Collection[str] | None = None,
    writes: bool = True,
) -> list[Outcome]:
    """Do the runs that have not been done yet.

    Args:
        runs: In the order of doing them. With the seeds in the outer loop, a study that is cut
            short has compared all settings under the seeds it got to.
        measure: Does a run, writing what it likes into the folder it is given, and returns the
            measured numbers by name.
        folder: The study's; it is made as needed.
        report: Gets a line when a run starts and when it has its result.
        shown: Names of the numbers that such a line has; all where it is None.
        writes: Whether this process writes the results. Of several that train together, one does.

    Returns:
        One outcome a run, in the order of ``runs``.

    Raises:
        UserError: A result in the folder has other settings or cannot be read.
    """
    known = {run.folder(folder): _read(run, run.folder(folder)) for run in runs}
    if len(known) < len(runs):
        raise UserError("a study has two runs of the same name and seed: each needs its own.")
    outcomes = []
    for number, (run, (place, outcome)) in enumerate(zip(runs, known.items(), strict=True), 1):
        title = f"[{number}/{len(runs)}] {run.name}, seed {run.seed}"
        if outcome is None:
            report(title)
            place.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            measured = measure(run, place)
            outcome = Outcome(run, measured, time.perf_counter() - start)
            if writes:
                _write(outcome, place)
        numbers = "  ".join(
            f"{name} {value:.4g}"
            for name, value in outcome.measured.items()
            if shown is None or name in shown
        )
        report(f"{title}: {numbers}  ({outcome.seconds:.0f} s)")
        outcomes.append(outcome)
    return outcomes


def finished(runs: Sequence[Run], folder: str | Path) -> list[Outcome]:
    """The outcomes of those runs that the study's folder has a result of, in the order of ``runs``.

    Raises:
        UserError: A result in the folder has other settings or cannot be read.
    """
    found = (_read(run, run.folder(folder)) for run in runs)
    return [outcome for outcome in found if outcome is not None]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and sample standard deviation over the seeds, by run name and number's name.

    The deviation of a single seed is NaN. A number that not every seed has is left out.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.run.name, []).append(outcome.measured)
    summary: dict[str, dict[str, tuple[float, float]]] = {}
    for name, seeds in rows.items():
        shared = [key for key in seeds[0] if all(key in one for one in seeds)]
        summary[name] = {}
        for key in shared:
            values = [one[key] for one in seeds]
            spread = stdev(values) if len(values) > 1 else math.nan
            summary[name][key] = (fmean(values), spread)
    return summary


@dataclass(frozen=True)
class Difference:
    """How far one row of a study is ahead of another, seed by seed.

    Attributes:
        mean: Of the differences.
        spread: Their sample standard deviation; NaN of a single seed.
        p: Of Student's paired t-test, two-sided; NaN of a single seed.
        seeds: How many both have.
    """

    mean: float
    spread: float
    p: float
    seeds: int

    @property
    def is_noise(self) -> bool:
        """Whether other seeds could have told the opposite: not p < 0.05."""
        return not self.p < 0.05


def paired_difference(
    outcomes: Sequence[Outcome], name: str, other: str, column: str
) -> Difference:
    """The row ``name`` minus the row ``other`` over the seeds that both have.

    Raises:
        ValueError: They have no seed with that number in common.
    """
    rows: dict[str, dict[int, float]] = {name: {}, other: {}}
    for outcome in outcomes:
        if outcome.run.name in rows and column in outcome.measured:
            rows[outcome.run.name][outcome.run.seed] = outcome.measured[column]
    seeds = sorted(rows[name].keys() & rows[other].keys())
    if not seeds:
        raise ValueError(f"{name} and {other} have no seed with {column} in common")
    differences = [rows[name][seed] - rows[other][seed] for seed in seeds]
    if len(seeds) == 1:
        return Difference(differences[0], math.nan, math.nan, 1)
    spread = stdev(differences)
    if spread == 0:
        p = 0.0 if differences[0] else math.nan
    else:
        from scipy.stats import ttest_1samp

        p = float(ttest_1samp(differences, 0.0).pvalue)
    return Difference(fmean(differences), spread, p, len(seeds))


def study_table(
    outcomes: Sequence[Outcome], columns: Sequence[str], *, scale: float = 100.0, digits: int = 1
) -> Table:
    """The summary for a terminal: a row a name, ``mean ± deviation`` a column, times ``scale``."""
    table = Table("", *columns)
    for name, row in summarize(outcomes).items():
        table.add_row(name, *(_cell(row.get(column), scale, digits) for column in columns))
    return table


def markdown_table(
    outcomes: Sequence[Outcome], columns: Sequence[str], *, scale: float = 100.0, digits: int = 1
) -> list[str]:
    """The same as the lines of a Markdown table."""
    lines = [" | ".join(("| ", *columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in summarize(outcomes).items():
        cells = (_cell(row.get(column), scale, digits) for column in columns)
        lines.append(" | ".join((f"| {name}", *cells)) + " |")
    return lines


def write_markdown(
    outcomes: Sequence[Outcome],
    columns: Sequence[str],
    file: str | Path,
    *,
    scale: float = 100.0,
    digits: int = 1,
) -> None:
    """The Markdown table in a file, which appears complete or not at all."""
    lines = markdown_table(outcomes, columns, scale=scale, digits=digits)
    replace_text(Path(file), "\n".join(lines) + "\n")


def _cell(value: tuple[float, float] | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    mean, spread = (scale * number for number in value)
    return mean_and_spread(mean, spread, digits)


def mean_and_spread(mean: float, spread: float, digits: int = 1, sign: str = "") -> str:
    """``mean ± spread`` as tables have it, the mean alone where the spread is NaN.

    With ``sign="+"`` the mean has its sign in any case.
    """
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _read(run: Run, place: Path) -> Outcome | None:
    file = place / RESULT_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        settings, measured, seconds = (content[k] for k in ("settings", "measured", "seconds"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the result of a run: remove it to measure again."
        ) from error
    wanted = json.loads(json.dumps(run.settings))
    if settings != wanted:
        changed = sorted(
            key for key in settings.keys() | wanted.keys() if settings.get(key) != wanted.get(key)
        )
        raise UserError(
            f"{file} was measured with other settings ({', '.join(changed)}): give another folder,"
            " or remove it to measure again."
        )
    return Outcome(run, measured, seconds)


def _write(outcome: Outcome, place: Path) -> None:
    content = {
        "name": outcome.run.name,
        "seed": outcome.run.seed,
        "settings": outcome.run.settings,
        "measured": outcome.measured,
        "seconds": round(outcome.seconds, 1),
    }
    replace_text(place / RESULT_FILE, json.dumps(content, indent=2) + "\n")
