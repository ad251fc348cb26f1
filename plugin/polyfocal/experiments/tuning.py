"""A search for the settings of a config's loss, with Optuna.

A trial is a short training on four fifths of the training split, judged by the other fifth. The val
split is not evaluated. The loss says which of its settings are worth a search, and in which range
(:meth:`polyfocal.losses.ClassificationLoss.tunable`).
"""

import contextlib
import copy
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from polyfocal.errors import UserError
from polyfocal.experiments.request import Experiment, Request, Setting
from polyfocal.experiments.study import differing

STORAGE_FILE = "search.db"
"""The SQLite file of a search, in its folder."""

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of the trials that tell something about their settings."""

_PATIENCE = 120  # seconds
_GREETING = 10  # seconds
_HEARTBEAT = 30  # seconds; a trial that misses two was killed, and is done again


class OutOfTime(Exception):
    """The time of the search ended in the middle of a trial."""


_NOT_THE_SETTINGS = (
    OutOfTime,
    KeyboardInterrupt,
    UserError,
    OSError,
    MemoryError,
    torch.cuda.OutOfMemoryError,
)
"""What ends a trial whatever its settings are: it comes first when the search goes on."""


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and how.

    Attributes:
        request: The config, the data and the rest.
        folder: Folder of the search.
        epochs: Epochs of a trial; None for a third of the config's, rounded up, or for all of them
            if the backbone is frozen.
        only: Names of settings, the only ones to search; None for all that the loss declares and
            the config does not switch off.
        storage: Storage of the search, see :func:`open_storage`; None for a file in the folder.
    """

    request: Request
    folder: Path
    epochs: int | None = None
    only: Sequence[str] | None = None
    storage: str | None = None

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """What is searched, by name.

        Raises:
            UserError: The main loss is not of this package, or has no such setting.
        """
        found = self.request.prepare().settings()
        for name in self.only or ():
            if name not in found:
                raise UserError(
                    f"--only {name}: {self.request.config} has {', '.join(found)} to search."
                )
        return {name: found[name] for name in found if self.only is None or name in self.only}

    @cached_property
    def trial_epochs(self) -> int:
        """How many epochs a trial has.

        Raises:
            UserError: More epochs than the config has, or the config does not count in epochs.
        """
        whole = self.request.prepare().epochs
        usual = whole if self.request.freeze else -(-whole // 3)
        epochs = usual if self.epochs is None else self.epochs
        if not 1 <= epochs <= whole:
            raise UserError(f"--epochs {epochs}: expected 1 to {whole}, the config's.")
        return epochs

    def values_of(self, params: Mapping[str, float]) -> dict[str, float]:
        """What a trial is trained with: values of three digits, the config's own as they are."""
        own = {name: setting.value for name, setting in self.settings.items()}
        return own if rounded(params) == rounded(own) else rounded(params)

    def search(
        self,
        study: optuna.Study,
        *,
        seed: int,
        minutes: float | None,
        trials: int | None,
        report: Callable[[FrozenTrial], None],
    ) -> None:
        """Do trials until the budget is used up; trials of earlier starts count.

        Args:
            study: From :func:`open_study`.
            seed: The seed of every trial, so that trials differ only by their settings.
            minutes: Minutes of the search. A trial that is under way then is ended; it counts for
                nothing and comes first when the search continues.
            trials: Number of finished or pruned trials.
            report: Gets each trial that has ended.

        Raises:
            UserError: The config or the data does not fit.
        """
        epochs = self.trial_epochs
        deadline = None
        if minutes is not None:
            left = 60 * minutes - searched_seconds(study)
            if left <= 0 or study.user_attrs.get("searched_minutes", 0) >= minutes:
                return
            deadline = time.monotonic() + left
        if trials is not None and len(study.get_trials(deepcopy=False, states=DONE)) >= trials:
            return
        short: Experiment = self.request.prepare()
        short.hold_out(self.folder / "split")
        short.use_epochs(epochs)
        best = short.quality[0]

        def objective(trial: Trial) -> float:
            start = time.monotonic()
            # No two trials draw the same numbers: neither those of a continued search, which would
            # begin again, nor those of processes that search together.
            study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + trial.number)
            values = {
                name: trial.suggest_float(name, s.range.low, s.range.high, log=s.range.log)
                for name, s in self.settings.items()
            }
            place = self.folder / "trials" / f"trial_{trial.number}"
            experiment = copy.deepcopy(short)
            experiment.use_values(self.values_of(values))
            try:
                watcher = _TrialWatcher(trial, best, epochs, deadline)
                measured = experiment.measure(place, seed=seed, watchers=[watcher])
            except _NOT_THE_SETTINGS:
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

        study.pruner = pruner(epochs)
        callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [ended]
        if trials is not None:
            callbacks.append(optuna.study.MaxTrialsCallback(trials, states=DONE))
        study.optimize(objective, catch=(OutOfTime,), callbacks=callbacks, gc_after_trial=True)
        if deadline is not None and time.monotonic() >= deadline:
            study.set_user_attr("searched_minutes", minutes)


def pruner(epochs: int) -> optuna.pruners.BasePruner:
    """What gives up trials of so many epochs."""
    # Not in the first third: during the warm-up of the learning rate a trial says nothing.
    return optuna.pruners.MedianPruner(n_warmup_steps=-(-epochs // 3))


class _TrialWatcher:
    """Tells the trial what each evaluation found, and ends it if it is hopeless or late."""

    def __init__(self, trial: Trial, metric: str, epochs: int, deadline: float | None) -> None:
        self.trial = trial
        self.metric = metric
        self.epochs = epochs
        self.deadline = deadline

    def step(self) -> None:
        """Look at the clock."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise OutOfTime

    def evaluated(self, epoch: int, measured: Mapping[str, float]) -> None:
        """Report, and prune before the next epoch if the median of the other trials is ahead."""
        if not measured.get(self.metric, -1) >= 0:
            raise UserError(
                f"the held-out fifth of the training split gives no {self.metric}, by which trials "
                "are compared: it is too small, or has no objects that it counts."
            )
        self.trial.report(measured[self.metric], epoch)
        if epoch < self.epochs and self.trial.should_prune():
            raise optuna.TrialPruned


def open_storage(storage: str) -> optuna.storages.BaseStorage:
    """Where searches are kept, for one process of possibly many, on several machines.

    In a database a trial has a heartbeat, and one whose process was killed is done again.

    Args:
        storage: A database as SQLAlchemy writes it (``postgresql://...``), Optuna's gRPC proxy
            (``grpc://HOST:PORT``), or the path of one of its journal files.
    """
    scheme, given, rest = storage.partition("://")
    if not given:
        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    if scheme == "grpc":
        host, _, port = rest.rstrip("/").rpartition(":")
        if not host or not port.isdecimal():
            raise UserError("expected grpc://HOST:PORT")
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
        proxy.wait_server_ready(timeout=_GREETING)
        return proxy
    engine: dict[str, Any] = {"pool_pre_ping": True}  # a trial is longer than some servers wait
    if scheme.startswith("sqlite"):
        # SQLite has one writer at a time: the dashboard and other workers are waited for.
        engine = {"connect_args": {"timeout": _PATIENCE}}

    def connect() -> optuna.storages.BaseStorage:
        return optuna.storages.RDBStorage(
            storage,
            engine_kwargs=engine,
            heartbeat_interval=_HEARTBEAT,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )

    try:
        return connect()
    except SQLAlchemyError:
        # Of processes that begin together one makes the tables, and the others fail to.
        time.sleep(1)
        return connect()


def shown(storage: str) -> str:
    """The address of a storage without its password."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", storage)


def open_study(
    folder: Path,
    settings: Mapping[str, Setting],
    identity: dict[str, Any],
    storage: str | None = None,
) -> Any:
    """The search of a folder; a new one begins with the config's own values.

    Args:
        folder: Made as needed. In a storage of several searches it is this one's name.
        settings: Of :class:`Tuning`.
        identity: What the trials depend on beside the settings, of JSON's kinds.
        storage: See :func:`open_storage`; None for a file in the folder.

    Raises:
        UserError: The folder holds another search, or its file or storage cannot be used.
    """
    file = folder / STORAGE_FILE
    place = str(file) if storage is None else f"--storage {shown(storage)}"
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
        study = optuna.create_study(
            storage=open_storage(storage or f"sqlite:///{file}"),
            study_name="tune" if storage is None else folder.as_posix(),
            direction="maximize",
            load_if_exists=True,
        )
    except Exception as error:  # SQLAlchemy's errors are of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if storage is not None:
            reason = reason.replace(storage, shown(storage)).removesuffix(".")
            raise UserError(f"{place} cannot keep a search: {reason}.") from error
        raise UserError(f"{file} cannot be used as the file of a search: {reason}.") from error
    found = study.user_attrs.get("identity")
    if found is not None and "annotations" not in found:  # an older version kept none
        identity.pop("annotations", None)
    if found is None:
        study.set_user_attr("identity", identity)
        study.enqueue_trial({name: s.value for name, s in settings.items()}, skip_if_exists=True)
    elif found != identity:
        changed = ", ".join(differing(found, identity))
        raise UserError(
            f"{place} is a search with other {changed}: give another --work-dir, or"
            " remove the file to search anew."
            if storage is None
            else f"{place} has a search {study.study_name} with other {changed}: give "
            "another --work-dir."
        )
    return study


@contextlib.contextmanager
def storage_errors(folder: Path, storage: str | None = None) -> Iterator[None]:
    """Make a sentence of it when the place of a search cannot be read or written any more.

    Raises:
        UserError: For example, if another program keeps the file locked.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        if storage is not None:
            raise UserError(
                f"--storage {shown(storage)} cannot be used any more: {reason}; the same command "
                "goes on."
            ) from error
        raise UserError(
            f"{folder / STORAGE_FILE} cannot be used: {reason}. Another program may keep it locked "
            f"for more than {_PATIENCE} s; the same command goes on."
        ) from error


def searched_seconds(study: optuna.Study) -> float:
    """The time of the search: trials side by side count once, killed trials not at all."""
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
    """Values with three significant digits, more than any search can tell apart."""
    return {name: float(f"{value:.3g}") for name, value in values.items()}
