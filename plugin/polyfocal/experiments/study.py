"""Studies: rows of settings times seeds, each trained and measured once, and their results.

A study is a YAML file (:class:`Study`) and a folder. Every finished run leaves
``<row>/seed_<n>/result.json`` in the folder, with its settings and what it measured. A study
that is started again does the missing runs. An adapter trains the runs.
"""

import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.request import recipe

RESULT_FILE = "result.json"
FACTORS = ("rate", "weight")
"""What a fair study tunes: factors of the learning rate and of the weight of the losses."""
_TUNED = ".tuned"
_TUNING_SEED = 0
_ROUNDING = 1e-12  # differences of equal numbers spread less than this
SCORES_FILE = "scores.npz"
_KINDS: dict[str, type] = {
    **dict.fromkeys(("columns", "options", "full_options", "scenes", "curvature", "fair"), dict),
    **dict.fromkeys(("loss", "published", "series"), dict),
    **dict.fromkeys(("notes", "splits", "hooks"), list),
}


@dataclass(frozen=True)
class Row:
    """One row of a study.

    Attributes:
        config: The config of the training.
        label: For people; the row's name if the file has no label.
        options: Overrides of the config. The text ``{seed}`` stands for the run's seed.
        loss: With a ``type``, the loss that replaces the config's classification loss in each head
            and takes over its weight. Without a ``type``, other settings of that loss. The text
            ``{ROW}`` stands for a file of scores: those that the run of that row with the same seed
            gives the training pictures.
        hooks: Hooks to add to the config's ``custom_hooks``.
        published: Numbers of a paper in the study's unit, by the metric's name.
        series: The row's place in each series it is in, for rank correlations and pictures.
    """

    config: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    hooks: list[dict[str, Any]] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)
    series: dict[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        """The rows whose scores this row's loss looks up."""
        return _names_in(self.loss)


@dataclass(frozen=True)
class Study:
    """What is compared, and what is measured.

    Attributes:
        name: The name of the file.
        title: For people.
        columns: Headers of the columns, by the metric's name. Numbers of another split have
            its name in front (``ood_top1``). Curvature is ``trace``, ``eigenvalue`` and ``loss``
            under the run's own loss, and the same with ``_ce`` under cross-entropy.
        rows: The rows by the names of their folders. The first row is the baseline.
        source: Where numbers were published; such a study has a table of them beside ours.
        notes: What a reader must know.
        scale: Factor from a measured number to the unit of the table: 100 gives per cent.
        same_data: Whether published and ours are on the same data, and their difference means
            something.
        options: Overrides of all rows' configs.
        full_options: More overrides with the configs' own models, not with tiny profile and demo.
        demo_epochs: Epochs of a run of the demo; None for those of the tiny profile.
        scenes: Settings of digit scenes that are made anew for each seed, instead of a data set.
        splits: More splits to measure on, such as ``ood``.
        curvature: ``batches``, ``probes``, ``parameters`` and the like of the curvature to measure.
        fair: The factors of the learning rate (``rate``) and of the loss weight (``weight``) that
            are tried for each row before it is trained, see :mod:`polyfocal.experiments.fair`.
    """

    name: str
    title: str
    columns: dict[str, str]
    rows: dict[str, Row]
    source: str | None = None
    notes: list[str] = field(default_factory=list)
    scale: float = 100.0
    same_data: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    full_options: dict[str, Any] = field(default_factory=dict)
    demo_epochs: int | None = None
    scenes: dict[str, Any] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)
    curvature: dict[str, Any] = field(default_factory=dict)
    fair: dict[str, list[float]] = field(default_factory=dict)

    def scale_of(self, key: str) -> float:
        """The factor from a measured number to that of a table."""
        return 1.0 if is_curvature(key) else self.scale

    def at_the_limit_of(self, outcomes: "Iterable[Outcome]") -> "Study":
        """This study with the recalls that its runs measured in place of those at 100 detections.

        Data with more than 100 objects in a picture is evaluated at more detections. There
        ``bbox_AR@200``, for example, takes the place of ``bbox_AR@100``, and its header says so.
        """
        measured = {key for one in outcomes for key in one.measured}
        columns = {}
        for key, header in self.columns.items():
            found = _at_the_limit(key, measured)
            columns[found] = header if found == key else f"{header} at {found.rpartition('@')[2]}"
        rows = {}
        for name, row in self.rows.items():
            published = {_at_the_limit(key, measured): one for key, one in row.published.items()}
            rows[name] = replace(row, published=published)
        return replace(self, columns=columns, rows=rows)

    def runs(
        self,
        seeds: Sequence[int],
        *,
        data: str | None = None,
        profile: str | None = None,
        demo: bool = False,
        freeze: bool = False,
        epochs: int | None = None,
        options: Mapping[str, Any] | None = None,
        contents: Mapping[str, str] | None = None,
        annotations: str | None = None,
    ) -> list["Run"]:
        """All runs, with the seeds in the outer loop, so that a stopped study has all rows.

        The tunings of a fair study come first.

        Args:
            seeds: Seeds of each row; one number N stands for 0 to N-1.
            data, profile, demo, freeze: As in the tools.
            epochs: Epochs of every run, instead of those of the config and the demo. A row that
                names its own in its options keeps them.
            options: Overrides of all configs, which win over the study's.
            contents: What tells whether a config was changed, by the rows' configs.
            annotations: What tells whether the data was changed.

        Raises:
            UserError: The options contradict each other or the study.
        """
        for option, value in (("seeds", min(seeds) if len(seeds) == 1 else 1), ("epochs", epochs)):
            if value is not None and value < 1:
                raise UserError(f"--{option} {value}: expected at least 1.")
        if len(seeds) == 1:
            seeds = range(seeds[0])
        tiny = demo or profile is not None
        if demo and data:
            raise UserError(
                "--demo is the built-in data set and --data another one: give one of them."
            )
        if data and self.scenes:
            raise UserError(f"{self.name} makes its own pictures: leave --data out.")
        if epochs and not tiny and self.source:
            raise UserError(
                "--epochs is for --demo and --profile tiny or small: the published schedule is"
                " fixed."
            )
        epochs = epochs or (self.demo_epochs if demo else None)
        # A stopped study loses no more than an epoch, and the checkpoints do not fill the disk.
        saving = "default_hooks.checkpoint"
        common: dict[str, Any] = {f"{saving}.interval": 1, f"{saving}.max_keep_ckpts": 2}
        if not tiny:  # the published batch, whatever the number of devices
            common |= {"auto_scale_lr.enable": True, **self.full_options}
        if epochs:
            common |= {"train_cfg.max_epochs": epochs, "train_cfg.val_interval": epochs}
        common |= self.options

        needed = {name for row in self.rows.values() for name in row.needs}

        def settings(name: str, row: Row) -> dict[str, Any]:
            more = {
                "content": (contents or {}).get(row.config),
                "annotations": annotations,
                "scores": name in needed,
                "loss": row.loss,
                "hooks": row.hooks,
                "scenes": self.scenes,
                "splits": self.splits,
                "curvature": self.curvature,
                "freeze": freeze,
                "fair": {**self.fair, "by": next(iter(self.columns))} if self.fair else {},
            }
            return {
                "config": row.config,
                "data": data,
                "profile": profile,
                **recipe(profile),
                "demo": demo,
                "options": {**common, **row.options, **(options or {})},
                **{key: value for key, value in more.items() if value},
            }

        known = {name: settings(name, row) for name, row in self.rows.items()}
        tunings = [Run(tuned_row(name), _TUNING_SEED, known[name]) for name in known if self.fair]
        return [*tunings, *(Run(name, seed, known[name]) for seed in seeds for name in known)]


def tuned_row(name: str) -> str:
    """The name of the run that tunes a row of a fair study."""
    return name + _TUNED


def is_curvature(key: str) -> bool:
    """Whether a number of a run, by its name, is of the loss surface: it is no fraction."""
    return re.fullmatch(r"(trace|trace_error|eigenvalue|loss)(_ce)?", key) is not None


def study_names(folder: Path) -> list[str]:
    """The studies of a folder."""
    return sorted(file.stem for file in folder.glob("*.yml"))


def find_study(name: str, folder: Path) -> Path:
    """The file of a study.

    Args:
        name: The name of a study in the folder, or a YAML file.
        folder: The folder of the shipped studies.

    Raises:
        UserError: There is none.
    """
    file = Path(name) if name.endswith((".yml", ".yaml")) else folder / f"{name}.yml"
    if not file.is_file():
        raise UserError(
            f"there is no study {name}: expected a YAML file, or one of "
            f"{', '.join(study_names(folder))}."
        )
    return file


def read_study(file: Path, config: str | None = None) -> Study:
    """Read a study's YAML file.

    Its keys are the attributes of :class:`Study`. ``config`` is the config of the rows that name
    none. ``_base_`` names another such file in the same folder, whose entries this file changes;
    null takes an entry away.

    Args:
        file: The file to read.
        config: Instead of the file's ``config``.

    Raises:
        UserError: The file is no study, or its rows have their own configs and another is given.
    """
    try:
        content = _with_base(file)
        own = content.pop("config", None)
        rows = {}
        for key, row in content.pop("rows").items():
            row = _stated(row or {})
            if config and "config" in row:
                raise UserError(f"--config {config}: the rows of {file.stem} have their own.")
            rows[str(key)] = Row(**{"label": str(key), "config": config or own, **row})
        study = Study(name=file.stem, rows=rows, **_stated(content))
        unknown = [
            key for row in rows.values() for key in row.published if key not in study.columns
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{file} is not a study: {error}.") from error
    away = {name for row in rows.values() for name in row.needs} - rows.keys()
    if away:
        raise UserError(f"{file} is not a study: a loss looks up {away.pop()}, which is no row.")
    if not rows or not all(isinstance(row.config, str) for row in rows.values()):
        raise UserError(f"{file} is not a study: it has no rows, or rows without a config.")
    if study.fair:
        _check_fair(study, file)
    if unknown:
        raise UserError(f"{file} publishes {unknown[0]}, which is none of its columns.")
    return study


def _stated(content: dict[str, Any]) -> dict[str, Any]:
    """What a file says; a key with nothing behind it says nothing."""
    stated = {key: value for key, value in content.items() if value is not None}
    for key, value in stated.items():
        kind = _KINDS.get(key)
        if kind is not None and not isinstance(value, kind):
            raise TypeError(f"{key} is {value!r}, not {'a mapping' if kind is dict else 'a list'}")
    return stated


def _check_fair(study: Study, file: Path) -> None:
    for name in FACTORS:
        values: Any = study.fair.get(name)
        numbers = isinstance(values, list) and all(isinstance(one, (int, float)) for one in values)
        if not numbers or 1.0 not in values or not all(0 < one < math.inf for one in values):
            raise UserError(
                f"{file}: fair.{name} is {values}: expected a list of factors above 0, with 1 in"
                " it."
            )
    if unknown := study.fair.keys() - set(FACTORS):
        raise UserError(f"{file}: fair has {min(unknown)}: expected {' and '.join(FACTORS)}.")
    for name, row in study.rows.items():
        if row.needs:
            raise UserError(
                f"{file}: the loss of {name} looks up the scores of another row, which there are"
                " not yet when a fair study tunes: leave fair or the row out."
            )


def _with_base(file: Path) -> dict[str, Any]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    base = content.pop("_base_", None)
    if base is None:
        return content
    try:
        return _merged(_with_base(file.parent / base), content)
    except RecursionError:
        raise TypeError("it is its own _base_") from None


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


@dataclass(frozen=True)
class Run:
    """One cell of the grid.

    Attributes:
        name: The name of the settings: a row of the table, and a folder.
        seed: The seed of everything random in the run.
        settings: What else decides the result, as JSON values. A result that was
            measured with other settings is not taken.
    """

    name: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def folder(self, study: str | Path) -> Path:
        """Where in the study's folder the run keeps its files."""
        return Path(study) / self.name / f"seed_{self.seed}"

    @property
    def tunes(self) -> bool:
        """Whether the run tunes a row of a fair study, and is no row itself."""
        return self.name.endswith(_TUNED)

    @property
    def names(self) -> set[str]:
        """The names by which ``--only`` knows the run; that of a row stands for its tuning too."""
        return {self.name.removesuffix(_TUNED), self.name, f"{self.name}/{self.seed}"}

    @property
    def needs(self) -> set[tuple[str, int]]:
        """Name and seed of the runs that this run needs.

        They are those whose scores of the training pictures its loss looks up, and its tuning.
        """
        looked_up = {(name, self.seed) for name in _names_in(self.settings.get("loss", {}))}
        tuning = self._tuning
        return looked_up if tuning is None else {*looked_up, (tuning.name, tuning.seed)}

    @property
    def _tuning(self) -> "Run | None":
        """The run that tunes this one; None for such a run itself and in other studies."""
        if self.tunes or not self.settings.get("fair"):
            return None
        return Run(tuned_row(self.name), _TUNING_SEED, self.settings)

    def factors(self, place: Path) -> dict[str, float]:
        """What the tuning of a fair study found for this run; nothing in another study.

        Args:
            place: The run's folder.

        Raises:
            UserError: The row has not been tuned.
        """
        tuning = self._tuning
        if tuning is None:
            return {}
        found = _read(tuning, tuning.folder(place.parents[1]))
        if found is None:
            raise UserError(
                f"{self.name} takes the learning rate and the loss weight that {tuning.name} finds,"
                f" and {tuning.name} is not done: name {self.name} with --only, without a seed."
            )
        return {name: found.measured[name] for name in FACTORS}

    def filled(self, place: Path) -> dict[str, Any]:
        """The settings with the run's seed and files in them.

        Args:
            place: The run's folder; those of the other rows are beside it.

        Raises:
            UserError: A row that this run needs has not been done.
        """

        def value_of(name: str) -> Any:
            if name == "seed":
                return self.seed
            file = place.parents[1] / name / place.name / SCORES_FILE
            if not file.is_file():
                raise UserError(
                    f"{self.name} needs the scores of {name}, and there is no {file}: do {name} "
                    "first, or name both with --only."
                )
            return str(file)

        return _filled(self.settings, value_of)


def _filled(node: Any, value_of: Callable[[str], Any]) -> Any:
    """A tree of settings in which each text ``{NAME}`` is replaced by its value."""
    if isinstance(node, dict):
        return {key: _filled(value, value_of) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, value_of) for value in node]
    name = re.fullmatch(r"\{(.+)\}", node) if isinstance(node, str) else None
    return value_of(name[1]) if name else node


def _at_the_limit(key: str, measured: Collection[str]) -> str:
    """The recall at most detections that was measured, if that at the key's was not."""
    name, at, limit = key.rpartition("@")
    if key in measured or not (at and limit.isdecimal()):
        return key
    numbers = [one.rpartition("@")[2] for one in measured if one.rpartition("@")[0] == name]
    largest = max([int(limit), *(int(one) for one in numbers if one.isdecimal())])
    return f"{name}@{largest}"


def _names_in(loss: dict[str, Any]) -> set[str]:
    names: set[str] = set()
    _filled(loss, names.add)
    return names - {"seed"}


def chosen(runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    """The runs of a study that ``--only`` names; all runs without it.

    Raises:
        UserError: The study does not have such a row or seed.
    """
    known = {name for run in runs for name in run.names}
    for name in only or ():
        if name not in known:
            rows = ", ".join(dict.fromkeys(run.name for run in runs))
            raise UserError(f"--only {name}: expected ROW or ROW/SEED with one of the rows {rows}.")
    return [run for run in runs if not only or run.names & set(only)]


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
        runs: The runs, in the order of doing them. With the seeds in the outer loop, a stopped
            study has compared all settings under the seeds so far.
        measure: Does a run in the folder that it is given, and returns the measured numbers by
            name.
        folder: The folder of the study; it is made if needed.
        report: Gets a line when a run starts and when it has its result.
        shown: Names of the numbers in such a line; None for all.
        writes: Whether this process writes the results. Of several processes that train together,
            one does.

    Returns:
        One outcome per run, in the order of ``runs``.

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
    """The outcomes of the runs that have a result in the study's folder, in the order of ``runs``.

    Raises:
        UserError: A result in the folder has other settings or cannot be read.
    """
    found = (_read(run, run.folder(folder)) for run in runs)
    return [outcome for outcome in found if outcome is not None]


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and sample standard deviation over the seeds, by run name and number's name.

    The deviation of a single seed is NaN. A number that is missing for some seed is left out.
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
        mean: The mean of the differences.
        spread: Sample standard deviation over the seeds; NaN for a single seed.
        p: The p of Student's paired t-test, two-sided; NaN for a single seed.
        seeds: How many seeds both rows have.
    """

    mean: float
    spread: float
    p: float
    seeds: int

    @property
    def is_noise(self) -> bool:
        """Whether the difference is within the noise of the seeds: not p < 0.05."""
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
    if spread < _ROUNDING:
        spread = 0.0
        p = 0.0 if abs(differences[0]) >= _ROUNDING else math.nan
    else:
        from scipy.stats import ttest_1samp

        p = float(ttest_1samp(differences, 0.0).pvalue)
    return Difference(fmean(differences), spread, p, len(seeds))


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of the settings that are not the same in both."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a config and their values as text; the keys are joined by dots."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list | tuple) and any(isinstance(one, dict) for one in node):
        children = enumerate(node)
    else:
        yield prefix, str(node)
    for key, value in children:
        if not str(key).startswith("_"):  # MMEngine's scopes, and the names of its own variables
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


def _read(run: Run, place: Path) -> Outcome | None:
    file = place / RESULT_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        settings, measured, seconds = (content[k] for k in ("settings", "measured", "seconds"))
        if not isinstance(settings, dict) or not isinstance(measured, dict):
            raise TypeError("settings and measured are objects")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the result of a run: remove it to measure again."
        ) from error
    wanted = json.loads(json.dumps(run.settings))
    names = {"content": "what the config says", "annotations": "what the data's annotations say"}
    for key in names:
        if key not in settings or key not in wanted:  # an older version kept none
            settings, wanted = ({**one, key: None} for one in (settings, wanted))
    if settings != wanted:
        changed = ", ".join(names.get(key, key) for key in differing(settings, wanted))
        raise UserError(
            f"{file} was measured with other settings ({changed}): give another folder,"
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
    write_text(place / RESULT_FILE, json.dumps(content, indent=2) + "\n")
