"""A search for the settings of a config's loss, with Optuna.

A trial is a short training on four fifths of the training split, judged by the rest of it; the val
split is not evaluated. The loss itself says which of its settings are worth a search, and where
(:meth:`polyfocal.losses.ClassificationLoss.tunable`).
"""

import os
import shutil
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import MODELS, DefaultScope
from optuna.trial import FrozenTrial, Trial, TrialState

from polyfocal.data.files import replace_text
from polyfocal.errors import UserError
from polyfocal.losses import Range
from polyfocal.mmdet.command_line import prepare_experiment
from polyfocal.mmdet.experiment import Experiment, read_config
from polyfocal.mmdet.studies import losses_of, train_and_measure

STORAGE_FILE = "search.db"
"""The SQLite file of a search, in its folder."""

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of the trials that tell something of their settings."""

_HEARTBEAT = 30  # seconds; a trial that misses two was killed, and is done again


@dataclass(frozen=True)
class Setting:
    """A setting of a loss: its value in the config, and where to search."""

    value: float
    range: Range


class OutOfTime(Exception):
    """The time of the search is over in the middle of a trial."""


@dataclass(frozen=True)
class Tuning:
    """What is tuned, on which data, and how.

    Attributes:
        config, data, tiny, demo, options: As in
            :func:`polyfocal.mmdet.command_line.prepare_experiment`.
        folder: Of the search.
        epochs: Of a trial; None for a third of the config's, rounded up.
        only: Names of settings, the only ones to search; None for all that the loss declares and
            the config does not switch off.
    """

    config: Path
    folder: Path
    data: str | None = None
    tiny: bool = False
    demo: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    only: Sequence[str] | None = None

    def prepare(self) -> Experiment:
        """The experiment of the config as it is.

        Raises:
            UserError: See :func:`polyfocal.mmdet.command_line.prepare_experiment`.
        """
        return prepare_experiment(
            self.config, data=self.data, tiny=self.tiny, demo=self.demo, options=dict(self.options)
        )

    def settings(self, experiment: Experiment) -> dict[str, Setting]:
        """What is searched, by name.

        Raises:
            UserError: The main loss is none of this package, or has no such setting.
        """
        cfg = experiment.config
        nodes = _losses(cfg)
        kinds = sorted({node.get("type") for node in nodes})
        if len(kinds) > 1:
            raise UserError(
                f"{self.config} has heads with different losses, {' and '.join(kinds)}: a search "
                "is for one."
            )
        try:
            with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
                loss = MODELS.build(nodes[0])
        except Exception as error:  # a config can name any class and give it anything
            raise UserError(f"the loss of {self.config} cannot be built: {error}") from error
        if not hasattr(loss, "tunable"):
            raise UserError(
                f"the classification loss of {self.config} is {kinds[0]}, which declares nothing "
                "to search: expected one of polyfocal's, such as type='polyfocal.FocalLoss'."
            )
        found = {}
        for name, range_ in loss.tunable().items():
            value = _value(loss, nodes[0], name)
            # None and a number a class are decisions that a search for one number does not take.
            if not isinstance(value, int | float) or (range_.log and value <= 0):
                continue
            # The config's own value is the first trial: it is always within.
            low, high = min(range_.low, value), max(range_.high, value)
            found[name] = Setting(float(value), Range(low, high, range_.log))
        for name in self.only or ():
            if name not in found:
                raise UserError(
                    f"--only {name}: {self.config} has {', '.join(found)} to search"
                    f" ({type(loss).__name__})."
                )
        return {name: found[name] for name in found if self.only is None or name in self.only}

    def trial_epochs(self, cfg: Config) -> int:
        """How many epochs a trial has.

        Raises:
            UserError: More than the config has, or it does not count in epochs.
        """
        whole = cfg.train_cfg.get("max_epochs")
        if whole is None:
            raise UserError(f"{self.config} has no train_cfg.max_epochs: a trial is some epochs.")
        epochs = -(-whole // 3) if self.epochs is None else self.epochs
        if not 1 <= epochs <= whole:
            raise UserError(f"--epochs {epochs}: expected 1 to {whole}, the config's.")
        return epochs

    def train(
        self,
        place: Path,
        *,
        seed: int,
        config: Path | None = None,
        values: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Train on the whole training split and measure on val, in full length.

        An interrupted run of the same settings goes on.

        Args:
            place: Folder of the run.
            seed: Of the run.
            config: Another config in the place of this one.
            values: Of the loss's settings.
        """

        def adapt(experiment: Experiment) -> None:
            use_values(experiment.config, values or {})

        return self._train(config or self.config, place, seed, adapt, resume=True)

    def search(
        self,
        study: optuna.Study,
        settings: Mapping[str, Setting],
        *,
        seed: int,
        minutes: float | None,
        trials: int | None,
        report: Callable[[FrozenTrial], None],
    ) -> None:
        """Do trials until the budget is used up; trials of earlier starts count.

        Args:
            study: From :func:`open_study`.
            settings: From :meth:`settings`.
            seed: Of every trial, so that they differ by their settings only.
            minutes: Of searching. A trial that is under way then is ended; it counts for nothing
                and comes first when the search goes on.
            trials: Finished or pruned ones.
            report: Gets each trial that has ended.

        Raises:
            UserError: The config or the data does not fit.
        """
        experiment = self.prepare()
        epochs = self.trial_epochs(experiment.config)
        best = experiment.quality[0]
        deadline = None
        if minutes is not None:
            left = 60 * minutes - searched_seconds(study)
            if left <= 0 or study.user_attrs.get("searched_minutes", 0) >= minutes:
                return
            deadline = time.monotonic() + left
        if trials is not None and len(study.get_trials(deepcopy=False, states=DONE)) >= trials:
            return

        def shorten(experiment: Experiment) -> None:
            experiment.hold_out(self.folder / "split")
            use_epochs(experiment.config, epochs)

        def objective(trial: Trial) -> float:
            start = time.monotonic()
            # No two trials draw the same numbers: not those of a search that goes on, which would
            # begin again, nor those of processes that search together.
            study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + trial.number)
            values = {
                name: trial.suggest_float(name, s.range.low, s.range.high, log=s.range.log)
                for name, s in settings.items()
            }
            place = self.folder / "trials" / f"trial_{trial.number}"

            def adapt(experiment: Experiment) -> None:
                shorten(experiment)
                use_values(experiment.config, rounded(values))

            try:
                measured = self._train(
                    self.config, place, seed, adapt, [_TrialHook(trial, best, epochs, deadline)]
                )
            except (OutOfTime, KeyboardInterrupt):
                study.enqueue_trial(values)
                study.stop()
                raise
            finally:
                trial.set_user_attr("seconds", time.monotonic() - start)
                shutil.rmtree(place / "run", ignore_errors=True)
            return measured[best]

        def ended(study: optuna.Study, trial: FrozenTrial) -> None:
            report(trial)
            if deadline is not None and time.monotonic() >= deadline:
                study.stop()

        # What a pruned trial needs to be compared with; the warm-up of the rate says nothing.
        study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=-(-epochs // 3))
        callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [ended]
        if trials is not None:
            callbacks.append(optuna.study.MaxTrialsCallback(trials, states=DONE))
        study.optimize(objective, catch=(OutOfTime,), callbacks=callbacks, gc_after_trial=True)
        if deadline is not None and time.monotonic() >= deadline:
            study.set_user_attr("searched_minutes", minutes)

    def _train(
        self,
        config: Path,
        place: Path,
        seed: int,
        adapt: Callable[[Experiment], None],
        hooks: Sequence[Hook] = (),
        resume: bool = False,
    ) -> dict[str, float]:
        return train_and_measure(
            config,
            place,
            seed=seed,
            data=self.data,
            tiny=self.tiny,
            demo=self.demo,
            options=self.options,
            adapt=adapt,
            hooks=hooks,
            resume=resume,
        )


class _TrialHook(Hook):
    """Tells the trial what each evaluation found, and ends it where it is hopeless or late."""

    priority = "VERY_LOW"

    def __init__(self, trial: Trial, metric: str, epochs: int, deadline: float | None) -> None:
        self.trial = trial
        self.metric = metric
        self.epochs = epochs
        self.deadline = deadline

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Look at the clock."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise OutOfTime

    after_val_iter = after_train_iter

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Report, and prune before another epoch where the median of the others is ahead."""
        found = [v for name, v in (metrics or {}).items() if name.split("/")[-1] == self.metric]
        if not found or not found[0] >= 0:
            raise UserError(
                f"the held-out fifth of the training split gives no {self.metric}, by which trials "
                "are compared: it is too small, or has no objects that it counts."
            )
        self.trial.report(found[0], runner.epoch)
        if runner.epoch < self.epochs and self.trial.should_prune():
            raise optuna.TrialPruned


def open_study(folder: Path, settings: Mapping[str, Setting], identity: dict[str, Any]) -> Any:
    """The search of a folder; a new one begins with the config's own values.

    Args:
        folder: Made as needed.
        settings: From :meth:`Tuning.settings`.
        identity: What the trials depend on beside the settings, of JSON's kinds.

    Raises:
        UserError: The folder holds another search, or its file cannot be used.
    """
    file = folder / STORAGE_FILE
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # The heartbeat, by which killed trials are found, is called experimental.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    identity = {
        **identity,
        "settings": {
            name: [s.value, s.range.low, s.range.high, s.range.log] for name, s in settings.items()
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{file}",
            heartbeat_interval=_HEARTBEAT,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )
        study = optuna.create_study(
            storage=storage, study_name="tune", direction="maximize", load_if_exists=True
        )
    except Exception as error:  # SQLAlchemy's errors are of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} cannot be used as the file of a search: {reason}.") from error
    found = study.user_attrs.get("identity")
    if found is None:
        study.set_user_attr("identity", identity)
        study.enqueue_trial({name: s.value for name, s in settings.items()})
    elif found != identity:
        changed = sorted(
            key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key)
        )
        raise UserError(
            f"{file} is a search with other {', '.join(changed)}: give another --work-dir, or"
            " remove the file to search anew."
        )
    return study


def searched_seconds(study: optuna.Study) -> float:
    """How long somebody was searching: trials side by side count once, killed ones not at all."""
    spans = []
    for trial in study.get_trials(deepcopy=False):
        if "seconds" in trial.user_attrs and trial.datetime_start is not None:
            begin = trial.datetime_start.timestamp()
            spans.append((begin, begin + trial.user_attrs["seconds"]))
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To three digits that count, more than any search can tell apart."""
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def use_values(cfg: Config, values: Mapping[str, float]) -> None:
    """Give the classification loss of a config, in each of its heads, other settings, in place."""
    for loss in _losses(cfg) if values else ():
        for name, value in values.items():
            key, _, place = name.partition(".")
            if place:
                loss[key] = [value if j == int(place) else old for j, old in enumerate(loss[key])]
            else:
                loss[key] = value


def use_epochs(cfg: Config, epochs: int) -> None:
    """Shorten a training, in place, its schedule with it; it is evaluated after every epoch."""
    share = epochs / cfg.train_cfg.max_epochs
    cfg.train_cfg.update(max_epochs=epochs, val_interval=1, val_begin=1)
    schedulers = cfg.get("param_scheduler") or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if not scheduler.get("by_epoch", True):
            continue
        for key in ("end", "T_max"):
            if scheduler.get(key) is not None:
                scheduler[key] = max(1, round(share * scheduler[key]))
        if "begin" in scheduler:
            scheduler.begin = round(share * scheduler.begin)
        if "milestones" in scheduler:
            scheduler.milestones = [max(1, round(share * one)) for one in scheduler.milestones]
    # Nobody looks at the weights of a trial.
    cfg.default_hooks.checkpoint = ConfigDict(
        type="CheckpointHook", interval=-1, save_last=False, by_epoch=True
    )


def write_config(
    file: Path, config: Path, values: Mapping[str, float], comment: Sequence[str]
) -> None:
    """Write a config that is another one with other settings of the loss.

    Args:
        file: To write.
        config: The ``_base_``.
        values: Of the settings.
        comment: Paragraphs to begin with.
    """
    old, new = read_config(config), read_config(config)
    use_values(new, values)
    changed = Config({"model": _changed(old.model.to_dict(), new.model.to_dict())})
    base = os.path.relpath(config.resolve(), file.parent.resolve())
    wrapped = [line for one in comment for line in textwrap.wrap(one, 98)]
    lines = [*(f"# {line}" for line in wrapped), f"_base_ = {Path(base).as_posix()!r}"]
    replace_text(file, "\n".join(lines) + f"\n{changed.pretty_text}")


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The entries of a nested dictionary that are new; a list is replaced as a whole."""
    changed = {}
    for key, value in new.items():
        if key in old and isinstance(value, dict) and isinstance(old[key], dict):
            if deeper := _changed(old[key], value):
                changed[key] = deeper
        elif key not in old or old[key] != value:
            changed[key] = value
    return changed


def _losses(cfg: Config) -> list[ConfigDict]:
    """The classification losses of a config, without the adapters around them."""
    nodes = [parent[key] for parent, key in losses_of(cfg.model)]
    return [
        node.loss if str(node.get("type")).rpartition(".")[2] == "RoILoss" else node
        for node in nodes
    ]


def _value(loss: Any, node: ConfigDict, name: str) -> Any:
    key, _, place = name.partition(".")
    value = getattr(loss, key, node.get(key))
    return value[int(place)] if place else value
