"""Run a paper's whole table over seeds, and write ours beside what was published.

A table is a file in configs/reproduce. Every run that is done keeps its numbers: a table that was
interrupted goes on where it was, in the middle of a training too, when the command is given again.
With real data it is the published experiment, as far as it is known; with --demo it ends on a
laptop.
"""

import argparse
import contextlib
import csv
import html
import io
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mmengine.dist import get_rank
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as ConsoleTable

from polyfocal.data.files import replace_text
from polyfocal.errors import UserError
from polyfocal.experiments.study import (
    Difference,
    Outcome,
    Run,
    finished,
    mean_and_spread,
    paired_difference,
    run_study,
    summarize,
)
from polyfocal.mmdet.command_line import check_launcher, run_tool
from polyfocal.mmdet.runs import join_processes
from polyfocal.mmdet.studies import train_and_measure
from polyfocal.mmengine.checkpoint import latest_checkpoint

EXAMPLES = """\
examples:
  # what there is to do, and nothing done
  python tools/reproduce.py polyloss_coco --demo --dry-run

  # Mask R-CNN with two losses and three seeds on the built-in pictures: 25 minutes on 2 cores
  python tools/reproduce.py polyloss_coco --demo --seeds 3

  # the published experiment on one GPU, on 8, or on Slurm, a job for each training
  python tools/reproduce.py polyloss_coco --data data/coco
  torchrun --standalone --nproc-per-node 8 tools/reproduce.py polyloss_coco --data data/coco \\
      --launcher pytorch
  python tools/reproduce.py polyloss_coco --data data/coco --slurm PARTITION --gpus 8

  # your own pictures on a CPU, two rows of the table
  python tools/reproduce.py retinanet_epsilon --data ~/cells --profile tiny --only focal epsilon_1
"""

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "configs" / "reproduce"

HEADER = ("", "", "published", "ours", "difference", "gain published", "gain ours", "p")


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        label: For people.
        config: A config of this repository.
        options: Overrides of it.
        published: Numbers of the paper in the table's unit, by the metric's name.
    """

    label: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A paper's table.

    Attributes:
        title: What is compared.
        source: Where the numbers were published.
        columns: Names of what is measured, by the metric's name.
        rows: By the name of their folder. The first is the baseline.
        notes: What a reader must know.
        scale: From what is measured to the table's unit: 100 makes per cent of parts.
        same_data: Whether published and ours are on the same data, and their difference means
            something.
        full_options: Overrides of the published experiment, not of tiny profile and demo.
        demo_epochs: Epochs of a run of the demo; the tiny profile's where it is None.
    """

    title: str
    source: str
    columns: dict[str, str]
    rows: dict[str, Row]
    notes: list[str] = field(default_factory=list)
    scale: float = 100.0
    same_data: bool = True
    full_options: dict[str, Any] = field(default_factory=dict)
    demo_epochs: int | None = None


@dataclass(frozen=True)
class Line:
    """A number of a row: published and ours, and against the baseline; NaN where there is none."""

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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", metavar="TABLE", help=f"one of {', '.join(table_names())}")
    parser.add_argument("--data", metavar="DIR", help="as with tools/train.py")
    parser.add_argument("--profile", choices=["tiny"], help="as with tools/train.py")
    parser.add_argument("--demo", action="store_true", help="as with tools/train.py, fewer epochs")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each row, seeds 0 to N-1"
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="of every run, with --demo or --profile tiny"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ROW[/SEED]", help="do these rows or runs now, not all"
    )
    parser.add_argument(
        "--work-dir", metavar="DIR", help="of the table (default: work_dirs/reproduce/TABLE)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how a run on several devices was started (torchrun: pytorch)",
    )
    parser.add_argument(
        "--slurm", metavar="PARTITION", help="submit a job for each run that is not done"
    )
    parser.add_argument("--gpus", type=int, default=8, help="of each such job (default: 8)")
    parser.add_argument(
        "--sbatch-args", default="", metavar="ARGS", help='more for sbatch: "--time=2-0 -A lab"'
    )
    return parser.parse_args(argv)


def table_names() -> list[str]:
    """The tables that there are."""
    return sorted(file.stem for file in TABLES.glob("*.yml"))


def read_table(name: str) -> Table:
    """A table of configs/reproduce.

    Raises:
        UserError: There is none of that name, or its file is not one.
    """
    if name not in table_names():
        raise UserError(f"there is no table {name}: expected one of {', '.join(table_names())}.")
    file = TABLES / f"{name}.yml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        rows = {str(key): Row(**row) for key, row in content.pop("rows").items()}
        table = Table(rows=rows, **content)
        unknown = [
            key for row in rows.values() for key in row.published if key not in table.columns
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a table: {error}.") from error
    if unknown:
        raise UserError(f"{file} publishes {unknown[0]}, which is none of its columns.")
    return table


def plan(table: Table, args: argparse.Namespace) -> list[Run]:
    """All runs of a table, with the seeds in the outer loop: cut short, it has compared all rows.

    Raises:
        UserError: The options contradict each other, or a number is out of range.
    """
    if args.demo and args.data:
        raise UserError("--demo is the built-in data set and --data another one: give one of them.")
    if args.slurm and args.launcher != "none":
        raise UserError(
            "--slurm starts jobs and --launcher is for the processes of one: give one of them."
        )
    for option in ("seeds", "epochs", "gpus"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: expected at least 1.")
    tiny = args.demo or args.profile == "tiny"
    if args.epochs and not tiny:
        raise UserError(
            "--epochs is for --demo and --profile tiny: the published schedule is fixed."
        )
    check_launcher(args.launcher)
    epochs = args.epochs or (table.demo_epochs if args.demo else None)
    # A table that is stopped loses no more than an epoch, and fills no disk.
    saving = "default_hooks.checkpoint"
    common: dict[str, Any] = {f"{saving}.interval": 1, f"{saving}.max_keep_ckpts": 2}
    if not tiny:  # the published batch, whatever the number of devices
        common |= {"auto_scale_lr.enable": True, **table.full_options}
    if epochs:
        common |= {"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs}
    data = {"data": args.data, "profile": args.profile, "demo": args.demo}
    return [
        Run(name, seed, {"config": row.config, **data, "options": {**common, **row.options}})
        for seed in range(args.seeds)
        for name, row in table.rows.items()
    ]


def chosen(runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    """The runs of the plan that ``--only`` names, all without it.

    Raises:
        UserError: It names what the plan has not.
    """
    known = {name for run in runs for name in _names(run)}
    for name in only or ():
        if name not in known:
            rows = ", ".join(dict.fromkeys(run.name for run in runs))
            raise UserError(f"--only {name}: expected ROW or ROW/SEED with one of the rows {rows}.")
    return [run for run in runs if not only or _names(run) & set(only)]


def _names(run: Run) -> set[str]:
    return {run.name, f"{run.name}/{run.seed}"}


def measure(run: Run, place: Path, launcher: str) -> dict[str, float]:
    """Train and evaluate one run; numbers below 0 are the metrics' word for "no ground truth"."""
    settings = run.settings
    measured = train_and_measure(
        ROOT / settings["config"],
        place,
        seed=run.seed,
        data=settings["data"],
        tiny=settings["profile"] == "tiny",
        demo=settings["demo"],
        options=settings["options"],
        resume=True,
        launcher=launcher,
    )
    return {name: value for name, value in measured.items() if value >= 0}


def lines(table: Table, outcomes: Sequence[Outcome]) -> list[Line]:
    """Every number of every row."""
    baseline = next(iter(table.rows))
    summary = summarize(outcomes)
    found = []
    for (name, row), (key, number) in (
        (row, column) for row in table.rows.items() for column in table.columns.items()
    ):
        mean, spread = (table.scale * x for x in summary.get(name, {}).get(key, (math.nan,) * 2))
        published = row.published.get(key, math.nan)
        others = table.rows[baseline].published.get(key, math.nan)
        gain = Difference(math.nan, math.nan, math.nan, 0)
        if name != baseline:
            with contextlib.suppress(ValueError):  # not measured yet
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
                difference=mean - published if table.same_data else math.nan,
                published_gain=math.nan if name == baseline else published - others,
                gain=table.scale * gain.mean,
                gain_spread=table.scale * gain.spread,
                p=gain.p,
            )
        )
    return found


def cells(line: Line) -> list[str]:
    """A line of the table for people, with one decimal, as papers have it."""
    return [
        line.label,
        line.number,
        _number(line.published),
        _number(line.mean, line.spread),
        _number(line.difference, sign="+"),
        _number(line.published_gain, sign="+"),
        _number(line.gain, line.gain_spread, sign="+"),
        "" if math.isnan(line.p) else "< 0.001" if line.p < 0.001 else f"{line.p:.3f}",
    ]


def _number(value: float, spread: float = math.nan, sign: str = "") -> str:
    return "" if math.isnan(value) else mean_and_spread(value, spread, sign=sign)


def remarks(table: Table, args: argparse.Namespace, runs: Sequence[Run], done: int) -> list[str]:
    """What a reader must know: what was run, what the columns mean, and the table's notes."""
    epochs = runs[0].settings["options"].get("train_cfg.max_epochs")
    schedule = f", {epochs} epoch{'s' * (epochs != 1)}" if epochs else ""
    tiny = args.demo or args.profile == "tiny"
    data = "the built-in data" if args.demo else args.data or "the configs' data"
    size = f"the tiny profile{schedule}" if tiny else "the configs' models and schedules"
    seeds = "one seed" if args.seeds == 1 else f"{args.seeds} seeds"
    said = [f"Published: {table.source}.", f"Ours: {data}, {size}, {seeds}."]
    if tiny:
        said.append(
            "This is not the published experiment: model and schedule are other ones"
            + (", the data too" if args.demo else "")
            + ". The published numbers stand beside ours so that the gains can be compared."
        )
    if done < len(runs):
        said.append(f"{done} of {len(runs)} runs are done: this table is not complete.")
    if args.seeds > 1:
        said.append(
            "Ours are means ± sample standard deviations over the seeds. A gain is against the "
            "first row; p is that of a two-sided paired t-test of the gain over the "
            f"{seeds}, not corrected for the number of rows and columns."
        )
    else:
        said.append("A gain is against the first row. One seed has no spread and no test.")
    return said + table.notes


def write_tables(table: Table, found: Sequence[Line], said: Sequence[str], folder: Path) -> None:
    """``table.md``, ``table.html`` and ``table.csv``, this one with all digits."""
    rows = [cells(line) for line in found]
    text = [f"# {table.title}", "", f"| {' | '.join(HEADER)} |", f"|---|---{'|---:' * 6}|"]
    text += [f"| {' | '.join(row)} |" for row in rows]
    text += ["", *(f"- {remark}" for remark in said)]
    replace_text(folder / "table.md", "\n".join(text) + "\n")
    replace_text(folder / "table.html", _page(table.title, rows, said))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = list(Line.__dataclass_fields__)
    writer.writerow(names)
    for line in found:
        values = (getattr(line, name) for name in names)
        writer.writerow(["" if value != value else value for value in values])
    replace_text(folder / "table.csv", stream.getvalue())


_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid #ccc; padding: .3em .6em; text-align: right; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
li { margin: .3em 0 }"""


def _page(title: str, rows: Sequence[Sequence[str]], said: Sequence[str]) -> str:
    """The same for a browser, in one file."""

    def row(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    body = "\n".join(row("td", texts) for texts in rows)
    items = "\n".join(f"<li>{html.escape(remark)}</li>" for remark in said)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
{_STYLE}
</style></head>
<body>
<h1>{html.escape(title)}</h1>
<table>
<thead>{row("th", HEADER)}</thead>
<tbody>
{body}
</tbody>
</table>
<ul>
{items}
</ul>
</body>
</html>
"""


def job(run: Run, place: Path, args: argparse.Namespace) -> list[str]:
    """The command that submits one run as a job of Slurm.

    Given twice, the second job waits for the first, finds its result and ends.
    """
    command = [sys.executable, "-u", str(Path(__file__).resolve()), args.table]
    for option in ("data", "profile", "seeds", "epochs", "work_dir"):
        value = getattr(args, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    command += ["--demo"] * args.demo
    command += ["--only", f"{run.name}/{run.seed}", "--launcher", "slurm"]
    on_a_machine = min(args.gpus, 8)
    # Two jobs on one machine must not meet at the same port.
    port = "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
    return [
        *("sbatch", "--parsable", "--partition", args.slurm),
        *("--job-name", f"{args.table}-{run.name}-{run.seed}", "--dependency", "singleton"),
        *("--ntasks", str(args.gpus), "--ntasks-per-node", str(on_a_machine)),
        *("--gres", f"gpu:{on_a_machine}", "--cpus-per-task", "5"),
        *("--output", str(place / "slurm-%j.txt"), *shlex.split(args.sbatch_args)),
        *("--wrap", f"{port}; srun --cpus-per-task 5 --kill-on-bad-exit=1 {shlex.join(command)}"),
    ]


def submit(runs: Sequence[Run], folder: Path, args: argparse.Namespace) -> None:
    """Submit a job for each run.

    Raises:
        UserError: There is no Slurm here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm submits with sbatch, and there is none on this machine.")
    for run in runs:
        place = run.folder(folder)
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(job(run, place, args), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"sbatch refuses {run.name}, seed {run.seed}: {done.stderr.strip()}")
        print(f"{run.name}, seed {run.seed}: job {done.stdout.strip()}")
    print(f"The table grows in {folder / 'table.md'} as the jobs end.")


def run(args: argparse.Namespace) -> None:
    """Do what the table of the command line still needs, and write it."""
    table = read_table(args.table)
    runs = plan(table, args)
    wanted = chosen(runs, args.only)
    join_processes(args.launcher)
    main_process = get_rank() == 0
    folder = Path(args.work_dir or Path("work_dirs") / "reproduce" / args.table)
    done = {outcome.run.folder(folder) for outcome in finished(runs, folder)}
    missing = [one for one in wanted if one.folder(folder) not in done]

    def say(line: str) -> None:
        if main_process:
            print(line, flush=True)

    say(
        f"{args.table}: {len(table.rows)} rows x {args.seeds} seeds = {len(runs)} runs, "
        f"{len(done)} done, {len(missing)} to do now; in {folder}"
    )
    for one in missing:
        checkpoint = latest_checkpoint(one.folder(folder) / "run")
        after = f" (goes on after {checkpoint.name})" if checkpoint else ""
        say(f"  {one.name}, seed {one.seed}: {one.settings['config']}{after}")
        if args.dry_run and args.slurm:
            say(f"    {shlex.join(job(one, one.folder(folder), args))}")
    if args.dry_run:
        return
    if args.slurm:
        submit(missing, folder, args)
        return
    if missing:
        say(f"What a run says while it trains: {missing[0].folder(folder) / 'console.log'}")
    run_study(
        wanted,
        partial(measure, launcher=args.launcher),
        folder,
        say,
        shown=table.columns,
        writes=main_process,
    )
    if not main_process:
        return
    outcomes = finished(runs, folder)
    found = lines(table, outcomes)
    said = remarks(table, args, runs, len(outcomes))
    write_tables(table, found, said, folder)
    console = Console()
    shown = ConsoleTable(*HEADER[1:], title=table.title, box=SIMPLE, pad_edge=False)
    shown.columns[0].no_wrap = True
    labels = []
    for line in found:
        if line.label not in labels:
            labels.append(line.label)
            shown.add_row(line.label)
        _, number, *others = cells(line)
        shown.add_row(f"  {number}", *others)
    console.print(shown)
    for remark in said:
        console.print(f"- {remark}", highlight=False, markup=False)
    print(f"also in {folder / 'table.md'}, .html and .csv")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status."""
    return run_tool(run, parse_args(argv), goes_on_with="the same command")


if __name__ == "__main__":
    sys.exit(main())
