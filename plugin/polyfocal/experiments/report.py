"""Tables and pages for people: a table of texts as Markdown, CSV, HTML or on a terminal."""

import base64
import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table as ConsoleTable
from rich.text import Text

from polyfocal.data.files import write_text, written_whole
from polyfocal.experiments.study import (
    Difference,
    Outcome,
    Run,
    Study,
    is_curvature,
    paired_difference,
    summarize,
)

# Okabe and Ito's colours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^Dv<>"


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
        header: Above the columns.
        rows: The cells.
        text_columns: How many of the columns, from the left, are texts and not numbers.
        best: Row and column of the cells to mark, in HTML.
        style: CSS class of the cells, in HTML.
    """

    kind: ClassVar[str] = "table"

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    best: Collection[tuple[int, int]] = ()
    style: str = ""

    def markdown(self) -> str:
        """The table in GitHub's Markdown, without a newline at the end."""
        numbers = len(self.header) - self.text_columns
        rule = "|---" * self.text_columns + "|---:" * numbers + "|"
        head, *body = (
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
            for row in (self.header, *self.rows)
        )
        return "\n".join((head, rule, *body))

    def console(self, title: str | None = None) -> ConsoleTable:
        """The table for a terminal."""
        shown = ConsoleTable(title=title, box=SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
        for number, name in enumerate(self.header):
            text = number < self.text_columns
            width = None if text else max((len(row[number]) for row in self.rows), default=0)
            shown.add_column(Text(name), justify="left" if text else "right", min_width=width)
        for row in self.rows:
            shown.add_row(*map(Text, row))
        return shown


@dataclass(frozen=True)
class Heading:
    """A small heading between the parts of a page's section."""

    kind: ClassVar[str] = "heading"

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture with its data in the page."""

    kind: ClassVar[str] = "picture"

    alt: str
    source: str

    @classmethod
    def of(cls, figure: Figure, alt: str, format_: Literal["svg", "jpeg"] = "svg") -> "Picture":
        """The picture of a figure."""
        stream = io.BytesIO()
        metadata = {"Date": None} if format_ == "svg" else None
        figure.savefig(stream, format=format_, dpi=110, metadata=metadata)
        kind = "svg+xml" if format_ == "svg" else format_
        data = base64.b64encode(stream.getvalue()).decode("ascii")
        return cls(alt, f"data:image/{kind};base64,{data}")


Part = str | Heading | Table | Picture
"""Of a section of a page; a text is a paragraph."""


def page(
    title: str,
    sections: Mapping[str, Sequence[Part]],
    notes: Sequence[str] = (),
) -> str:
    """One page of HTML that loads nothing else.

    Args:
        title: The title of the page.
        sections: Parts of the sections by title; nothing links to a section with an empty title.
        notes: Paragraphs that stand out, above the sections.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    template = environment.get_template("page.html")
    return template.render(title=title, sections=sections, notes=notes)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file; NaN is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow("" if value != value else value for value in row)
    return stream.getvalue()


def mean_and_spread(mean: float, spread: float = math.nan, digits: int = 1, sign: str = "") -> str:
    """``mean ± spread`` for a table; the mean alone if the spread is NaN, or an empty text.

    With ``sign="+"`` the mean always has its sign.
    """
    if math.isnan(mean):
        return ""
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def p_text(p: float) -> str:
    """A p for a table, with three digits; NaN is an empty text."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def summary_table(
    outcomes: Sequence[Outcome],
    columns: Mapping[str, str],
    *,
    scale: float = 100.0,
    labels: Mapping[str, str] | None = None,
    corner: str = "",
    digits: int = 1,
    sign: str = "",
) -> Table:
    """A row per name, ``mean ± deviation`` over the seeds per column.

    Args:
        outcomes: Outcomes in the order of the rows.
        columns: Names of the measured numbers, and the headers of their columns.
        scale: Factor from a measured number to the unit of the table. Curvature stays as it is,
            with three digits.
        labels: Labels of rows that are not shown by their names.
        corner: Header of the column of labels.
        digits: Digits after the point.
        sign: "+" to show the sign of every number.
    """

    def cell(key: str, found: tuple[float, float] | None) -> str:
        if found is None:
            return ""
        if is_curvature(key):
            size = abs(found[0])
            return mean_and_spread(*found, max(0, 2 - math.floor(math.log10(size))) if size else 0)
        return mean_and_spread(scale * found[0], scale * found[1], digits, sign)

    rows = [
        [(labels or {}).get(name, name), *(cell(key, row.get(key)) for key in columns)]
        for name, row in summarize(outcomes).items()
    ]
    return Table((corner, *columns.values()), rows)


@dataclass(frozen=True)
class Line:
    """A number of a row: published, ours, and the gains over the baseline; NaN if missing."""

    row: str
    label: str
    number: str
    published: float
    mean: float
    spread: float
    seeds: int
    difference: float
    published_gain: float
    gain: float
    gain_spread: float
    p: float


def lines(study: Study, outcomes: Sequence[Outcome]) -> list[Line]:
    """Every number of every row of a study."""
    baseline = next(iter(study.rows))
    summary = summarize(outcomes)
    found = []
    for (name, row), (key, number) in (
        (row, column) for row in study.rows.items() for column in study.columns.items()
    ):
        scale = study.scale_of(key)
        mean, spread = (scale * x for x in summary.get(name, {}).get(key, (math.nan,) * 2))
        published = row.published.get(key, math.nan)
        others = study.rows[baseline].published.get(key, math.nan)
        gain = Difference(math.nan, math.nan, math.nan, 0)
        if name != baseline:
            with suppress(ValueError):  # not measured yet
                gain = paired_difference(outcomes, name, baseline, key)
        found.append(
            Line(
                row=name,
                label=row.label,
                number=number,
                published=published,
                mean=mean,
                spread=spread,
                seeds=sum(one.run.name == name and key in one.measured for one in outcomes),
                difference=mean - published if study.same_data else math.nan,
                published_gain=math.nan if name == baseline else published - others,
                gain=scale * gain.mean,
                gain_spread=scale * gain.spread,
                p=gain.p,
            )
        )
    return found


def published_table(found: Sequence[Line], *, grouped: bool = False) -> Table:
    """Our numbers beside the published ones, with one decimal as papers have it.

    Args:
        found: From :func:`lines`.
        grouped: For a terminal: a row's label on its own line, and no empty columns.
    """
    header = ("", "", "published", "ours", "difference", "gain published", "gain ours", "p")
    rows: list[list[str]] = []
    label = None
    for line in found:
        if grouped and line.label != label:
            rows.append([line.label, *[""] * 6])
        label = line.label
        rows.append(
            [
                *([f"  {line.number}"] if grouped else [line.label, line.number]),
                mean_and_spread(line.published),
                mean_and_spread(line.mean, line.spread),
                mean_and_spread(line.difference, sign="+"),
                mean_and_spread(line.published_gain, sign="+"),
                mean_and_spread(line.gain, line.gain_spread, sign="+"),
                p_text(line.p),
            ]
        )
    if not grouped:
        return Table(header, rows, text_columns=2)
    # A terminal has no room for empty columns.
    filled = [0, *(i for i in range(1, 7) if any(row[i] for row in rows))]
    return Table([header[i + 1] for i in filled], [[row[i] for i in filled] for row in rows])


def remarks(study: Study, runs: Sequence[Run], done: int) -> list[str]:
    """What a reader must know: what was run, what the columns mean, and the study's notes.

    Args:
        study: The study.
        runs: All runs of the study.
        done: How many runs are done.
    """
    settings = runs[0].settings
    epochs = settings["options"].get("train_cfg.max_epochs")
    schedule = f", {epochs} epoch{'s' * (epochs != 1)}" if epochs else ""
    profile = settings["profile"] or ("tiny" if settings["demo"] else None)
    data = settings["data"] or "the configs' data"
    if study.scenes:
        data = "digit scenes made for each seed"
    elif settings["demo"]:
        data = "the built-in data"
    frozen = " with a frozen backbone" if settings.get("freeze") else ""
    size = f"the {profile} profile{frozen}{schedule}"
    if profile is None:
        size = "the configs' models and schedules"
    configs = {run.settings["config"] for run in runs}
    config = f"{Path(configs.pop()).name}, " if len(configs) == 1 else ""
    count = len({run.seed for run in runs if not run.tunes})
    seeds = "one seed" if count == 1 else f"{count} seeds"
    said = [f"Published: {study.source}."] if study.source else []
    said.append(f"Ours: {data}, {config}{size}, {seeds}.")
    if profile and study.source:
        said.append(
            "This is not the published experiment: the model and the schedule differ"
            + (", the data too" if settings["demo"] else "")
            + ". The published numbers stand beside ours so that the gains can be compared."
        )
    if done < len(runs):
        said.append(f"{done} of {len(runs)} runs are done: this table is not complete.")
    if count > 1:
        said.append("Ours are means ± sample standard deviations over the seeds.")
    if study.source and count > 1:
        said.append(
            "A gain is against the first row; p is that of a two-sided paired t-test of the gain "
            f"over the {seeds}, not corrected for the number of rows and columns."
        )
    elif study.source:
        said.append("A gain is against the first row. One seed has no spread and no test.")
    if study.fair:
        trainings = sum(map(len, study.fair.values())) - 1
        said.append(
            "The learning rate and the weight of the loss were tuned for each row, by"
            f" {trainings} trainings at most on four fifths of the training split and measured on"
            " the fifth that was held out."
        )
    if study.fair and count > 1:
        said.append(
            "A difference is against the first row, seed by seed; its effect is the mean in units"
            " of its deviation. The interval is of draws of the pictures and the seeds, and too"
            " narrow for seeds that are few and differ much. p is that of a two-sided paired"
            " t-test, and then corrected for the number of rows (Holm)."
        )
    return said + study.notes


def study_tables(
    study: Study, outcomes: Sequence[Outcome], *, grouped: bool = False
) -> list[Table]:
    """The tables of a study: beside published numbers, or of its rows and their correlations.

    Args:
        study: The study.
        outcomes: The outcomes so far.
        grouped: See :func:`published_table`.
    """
    if study.source:
        return [published_table(lines(study, outcomes), grouped=grouped)]
    labels = {name: row.label for name, row in study.rows.items()}
    outcomes = _of_rows(study, outcomes)
    columns = _measured_columns(study, outcomes)
    table = summary_table(outcomes, columns, scale=study.scale, labels=labels)
    rhos = rank_correlations(study, outcomes)
    if not rhos:
        return [table]
    curvatures = {key: name for key, name in columns.items() if is_curvature(key)}
    # Correlations have no unit, although their columns have the names of curvature.
    named = {f"with {key}": name for key, name in curvatures.items()}
    renamed = [
        Outcome(rho.run, {f"with {key}": value for key, value in rho.measured.items()}, 0.0)
        for rho in rhos
    ]
    corner = "rank correlation with"
    return [table, summary_table(renamed, named, scale=1, digits=2, sign="+", corner=corner)]


def rank_correlations(study: Study, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Does calibration correlate with curvature? Spearman's rho along each series, for each seed.

    1: the flatter, the better calibrated, as the paper finds; -1: the opposite. Series of fewer
    than three rows have no correlation.
    """
    from scipy.stats import spearmanr

    columns = _measured_columns(study, outcomes)
    curvatures = [key for key in columns if is_curvature(key)]
    measured = {(one.run.name, one.run.seed): one.measured for one in outcomes}

    def rho(names: Sequence[str], seed: int, *keys: str) -> float:
        return spearmanr(*([measured[name, seed][key] for name in names] for key in keys)).statistic

    return [
        Outcome(
            Run(f"{title}: {columns[measure]}", seed),
            {key: rho(names, seed, key, measure) for key in curvatures},
            0.0,
        )
        for title, names in _series(study, outcomes).items()
        for measure in _measures(columns)
        for seed in dict.fromkeys(one.run.seed for one in outcomes)
        if len(names) >= 3 and curvatures
    ]


def draw_series(study: Study, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """One picture per measure: against curvature and the first column, a line per series."""
    outcomes = _of_rows(study, outcomes)
    columns, summary = _measured_columns(study, outcomes), summarize(outcomes)
    series = _series(study, outcomes)
    curvatures = [key for key in columns if is_curvature(key)]
    files = []
    for measure in _measures(columns) if series else ():
        across = [*curvatures, *(key for key in list(columns)[:1] if key != measure)]
        figure = Figure(figsize=(3.6 * len(across), 3.4))
        axes = figure.subplots(1, len(across), sharey=True, squeeze=False)[0]
        for axis, key in zip(axes, across, strict=True):
            for (label, names), color, marker in zip(
                series.items(), COLORS, _MARKERS, strict=False
            ):
                points = [(summary[name][key], summary[name][measure]) for name in names]
                (x, dx), (y, dy) = (zip(*(p[i] for p in points), strict=True) for i in (0, 1))
                style = {"label": label, "color": color, "marker": marker, "lw": 1, "capsize": 2}
                axis.errorbar(x, y, xerr=_bars(dx), yerr=_bars(dy), **style)
                for name, *place in zip(names, x, y, strict=True):
                    text = f"{study.rows[name].series[label]:g}"
                    offset = {"xytext": (4, 4), "textcoords": "offset points"}
                    axis.annotate(text, place, **offset, fontsize=7, color=color)
            means = [row[key][0] for row in summary.values()]
            if min(means) > 0 and max(means) > 20 * min(means):
                axis.set_xscale("log")
            axis.set_xlabel(columns[key])
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(columns[measure])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(series), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.92))
        files.append(folder / f"{measure}.svg")
        with written_whole(files[-1]) as part:
            figure.savefig(part, metadata={"Date": None})
    return files


def write_study(
    study: Study,
    runs: Sequence[Run],
    outcomes: Sequence[Outcome],
    folder: Path,
    more: Sequence[Table] = (),
) -> list[Path]:
    """Write the results of a study, and more tables below its own.

    ``table.md`` and ``table.html`` for people; ``table.csv`` with all digits and the gains;
    ``runs.csv`` with every run and all its numbers; a picture per measure if rows are in series.

    Returns:
        The files.
    """
    tables = [*study_tables(study, outcomes), *more]
    said = remarks(study, runs, len(outcomes))
    keys = dict.fromkeys(key for one in outcomes for key in one.measured)
    parts = [f"# {study.title}", *(table.markdown() for table in tables)]
    texts = {
        "table.md": "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in said)]) + "\n",
        "table.html": page(study.title, {"": [*tables, *said]}),
        "table.csv": csv_text([f.name for f in fields(Line)], map(astuple, lines(study, outcomes))),
        "runs.csv": csv_text(
            ["name", "seed", "seconds", *keys],
            (
                [one.run.name, one.run.seed, round(one.seconds)]
                + [one.measured.get(key, "") for key in keys]
                for one in outcomes
            ),
        ),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *draw_series(study, outcomes, folder)]


def _of_rows(study: Study, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of the rows in their order, without those of the tunings."""
    return [one for name in study.rows for one in outcomes if one.run.name == name]


def _measured_columns(study: Study, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The columns in which some row has a number."""
    known = {key for row in summarize(outcomes).values() for key in row}
    return {key: name for key, name in study.columns.items() if key in known}


def _measures(columns: Mapping[str, str]) -> list[str]:
    """What is plotted against curvature: every column except the first and curvature itself."""
    first, *others = columns or [""]
    return [key for key in others if not is_curvature(key)] or [key for key in [first] if key]


def _series(study: Study, outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """The rows of each series in the order of their values, if every seed has the whole series."""
    columns = _measured_columns(study, outcomes)
    seeds = {one.run.seed for one in outcomes}
    done = {name: 0 for name in study.rows}
    for one in outcomes:
        done[one.run.name] += columns.keys() <= one.measured.keys()
    places = [
        (title, value, name)
        for name, row in study.rows.items()
        for title, value in row.series.items()
        if done[name] == len(seeds)
    ]
    series: dict[str, list[str]] = {title: [] for title, _, _ in places}
    for title, _, name in sorted(places, key=lambda place: place[1]):
        series[title].append(name)
    return series


def _bars(spreads: Iterable[float]) -> list[float]:
    return [0.0 if math.isnan(spread) else spread for spread in spreads]
