"""Training and testing, from a ready config to the table and the pictures."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import barrier, init_dist, is_distributed, is_main_process
from mmengine.hooks import EMAHook, Hook
from rich.console import Console, RenderableType

from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.study import differing, flat
from polyfocal.experiments.trained import KEPT_RESULTS
from polyfocal.folders import own_folder
from polyfocal.mmengine.checkpoint import (
    STARTED_FILE,
    CheckpointGuardHook,
    check_checkpoint,
    latest_checkpoint,
    only_data,
)
from polyfocal.mmengine.console import ConsoleRunner, HostMemoryHook, ProgressBarHook
from polyfocal.mmengine.curvature import Curvature, fixed_batches, measure_curvature
from polyfocal.mmengine.hooks import ExactResumeHook, LossHook
from polyfocal.mmengine.objects import check_training_objects, is_empty, nothing_to_train_on
from polyfocal.mmengine.work_dir import short_names
from polyfocal.tables import table

_PLACE = ("work_dir", "launcher", "experiment_name")  # where a training runs, not what it trains
_SHOWN = 5


class Runnable(Protocol):
    """What is run: see :class:`polyfocal.mmengine.experiment.Experiment`."""

    config: Config
    notes: list[str]

    def tables(self, metrics: list[Any]) -> list[RenderableType]: ...
    def check_metrics(self, metrics: list[Any], dataset: Any) -> None: ...
    def keep_results(self, metrics: list[Any], prefix: Path) -> None: ...
    def draw(self, runner: Any) -> Path | None: ...


@only_data()
def train(
    experiment: Runnable,
    *,
    resume: str | None = None,
    load_from: str | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Train, evaluate on the val split, and draw predictions beside the ground truth.

    The detections of the last evaluation stay in the work directory as COCO results.

    Args:
        experiment: From :func:`polyfocal.adapters.prepare`, with a
            ``work_dir``.
        resume: A checkpoint to continue from, or ``"auto"`` for the work directory's last one.
        load_from: A checkpoint to take weights from; weights that do not fit are left out.
        hooks: Hooks to register beside the config's. An exception of a hook ends the training.

    Returns:
        What the last evaluation measured, by the metrics' names.

    Raises:
        UserError: The config or a checkpoint does not fit. The work directory cannot be written, or
            belongs to another training.
    """
    bar = ProgressBarHook()
    with own_folder(Path(experiment.config.work_dir), "--work-dir"):
        runner = _build_training(experiment, resume, load_from, [bar, *hooks])
        start = time.perf_counter()
        try:
            runner.train()
            if not bar.evaluated:
                # The training was resumed at its end: there was nothing left to train.
                runner.val_loop.run()
        finally:
            bar.close()
        hub = runner.message_hub.log_scalars
        measured = {
            name.removeprefix("val/"): history.current()
            for name, history in hub.items()
            if name.startswith("val/") and not name.endswith("time")
        }
        if not is_main_process():
            return measured
        minutes, seconds = divmod(round(time.perf_counter() - start), 60)
        lines: dict[str, Any] = {"training": f"{minutes} min {seconds} s"}
        last = latest_checkpoint(runner.work_dir)
        if last is not None:
            lines["checkpoint"] = _short(last)
        with _as_evaluated(runner):
            pictures = experiment.draw(runner)
        if pictures is not None:
            lines["pictures"] = _short(pictures)
        _report(runner, _tables(experiment, runner.val_evaluator.metrics, measured), lines)
        return measured


@only_data()
def test(
    experiment: Runnable, checkpoint: str, *, more_metrics: list[Any] | None = None
) -> dict[str, float]:
    """Evaluate a checkpoint on the test data of a config; ``--data`` makes that the val split.

    Args:
        experiment: From :func:`polyfocal.adapters.prepare`, with a
            ``work_dir``.
        checkpoint: A file or an address that MMEngine knows.
        more_metrics: Metrics to fill beside the config's, such as MMDetection's ``DumpDetResults``.

    Returns:
        What was measured, by the metrics' names.

    Raises:
        UserError: The config or the checkpoint does not fit.
    """
    runner = _load(experiment, checkpoint)
    metrics = runner.test_evaluator.metrics
    experiment.check_metrics(metrics, runner.test_dataloader.dataset)
    metrics.extend(more_metrics or [])
    bar = ProgressBarHook()
    runner.register_hook(bar)
    try:
        measured = runner.test()
    finally:
        bar.close()
    if is_main_process():
        _report(runner, _tables(experiment, runner.test_evaluator.metrics, measured), {})
    return measured


def _tables(
    experiment: Runnable, metrics: list[Any], measured: dict[str, float]
) -> list[RenderableType]:
    """The tables of the metrics; if no metric has a table, a plain table of what was measured."""
    tables = experiment.tables(metrics)
    if tables or not measured:
        return tables
    return [table(None, ("", "measured"), short_names(measured).items())]


def train_into(
    place: Path,
    experiment: Runnable,
    *,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    launcher: str = "none",
) -> dict[str, float]:
    """Train in a folder; what the tools print goes to ``place/console.log``.

    Args:
        place: Folder of the run; ``place/run`` is replaced, unless ``resume``.
        experiment: With its seed.
        hooks: See :func:`train`.
        resume: Continue an interrupted run in ``place/run``, unless it was started with another
            config; :data:`STARTED_FILE` in that folder holds the config with all settings.
        launcher: How the processes that train together were started, ``"none"`` for a single
            process.

    Returns:
        Numbers by the shortest ends of the metrics' names, such as ``top1`` or ``bbox_mAP``.

    Raises:
        UserError: The config or the data is not usable, or another training is under way there.
    """
    join_processes(launcher)
    with console_of(place, resume):
        start_in(place, experiment, "train", resume=resume, launcher=launcher)
        measured = train(experiment, resume="auto" if resume else None, hooks=hooks)
    return short_names(measured)


def start_in(
    place: Path, experiment: Runnable, name: str, *, resume: bool, launcher: str = "none"
) -> None:
    """Give an experiment the work directory ``place/run``, the existing one or a new one.

    Args:
        place: Folder of the run.
        experiment: For a training, or for a test in the same place.
        name: Tells several jobs in one folder apart; ``"train"`` for the training.
        resume: See :func:`train_into`.
        launcher: Likewise.
    """
    cfg, work_dir = experiment.config, place / "run"
    if name == "train" and is_main_process():
        started = work_dir / STARTED_FILE
        same = started.is_file() and started.read_text(encoding="utf-8") == _settings(cfg)
        if not (resume and same):
            with own_folder(work_dir, "--work-dir"):
                pass  # no other training is under way there
            shutil.rmtree(work_dir, ignore_errors=True)
            work_dir.mkdir(parents=True)
    barrier()
    cfg.work_dir = str(work_dir)
    cfg.launcher = launcher
    # A new name each time: MMEngine hands out what an earlier run of the same name has logged.
    cfg.experiment_name = f"{place}-{name}"


@contextlib.contextmanager
def console_of(place: Path, resume: bool) -> Iterator[None]:
    """Send what is printed to ``place/console.log``; with ``resume`` it is appended."""
    place.mkdir(parents=True, exist_ok=True)
    log = place / "console.log" if is_main_process() else os.devnull
    with (
        open(log, "a" if resume else "w", encoding="utf-8") as console,
        contextlib.redirect_stdout(console),
    ):
        yield


def set_up(cfg: Config, work_dir: str | None, launcher: str, local_rank: int) -> None:
    """Set where a config runs, and in how many processes.

    Args:
        cfg: The config.
        work_dir: None for the config's, or ``work_dirs/`` and the config's name.
        launcher: How the processes were started, ``"none"`` for a single process.
        local_rank: The local rank of this process, if the environment does not have it.

    Raises:
        UserError: The tool is to be started in another way.
    """
    check_launcher(launcher)
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / Path(cfg.filename).stem)


def check_launcher(launcher: str) -> None:
    """Refuse a launcher that did not start this process, or has no GPU to give it.

    Raises:
        UserError: The tool is to be started in another way.
    """
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch is for a tool that torchrun starts, as tools/dist_train.sh and "
            "tools/dist_test.sh do."
        )
    if launcher in ("slurm", "mpi") and get_device() == "cpu":
        raise UserError(
            f"--launcher {launcher} runs one process on each GPU, and torch finds none here: "
            "start the tool without it."
        )


def join_processes(launcher: str) -> None:
    """Connect the processes that train together before there is a runner.

    Args:
        launcher: How they were started, ``"none"`` for a single process. With ``"pytorch"`` they
            may be without GPUs.
    """
    if launcher == "none" or is_distributed():
        return
    if launcher == "pytorch" and get_device() == "cpu":
        torch.distributed.init_process_group("gloo")
    else:
        init_dist(launcher)


@only_data()
def curvature(
    experiment: Runnable, checkpoint: str, *, batches: int, seed: int = 0, **settings: Any
) -> Curvature:
    """Measure the curvature of the training loss at the weights of a checkpoint.

    Args:
        experiment: From :func:`polyfocal.adapters.prepare`, with a ``work_dir``.
        checkpoint: A file.
        batches: Batches of the training data.
        seed: Seed of the choice of pictures and of the probes.
        settings: See :func:`polyfocal.mmengine.curvature.measure_curvature`.

    Raises:
        UserError: The config or the checkpoint does not fit, or a setting.
    """
    runner = _load(experiment, checkpoint)
    meta = runner.load_checkpoint(checkpoint).get("meta", {})
    loop = runner.train_loop
    # A loss with a schedule reads these, and MMDetection's TOODHead; a checkpoint without a date
    # counts as the end.
    for unit in ("iter", "epoch"):
        most = getattr(loop, f"max_{unit}s")
        done = min(meta.get(unit, most), most)
        runner.message_hub.update_info(f"max_{unit}s", most)
        runner.message_hub.update_info(unit, max(0, done - 1))
    samples = fixed_batches(loop.dataloader, batches, seed)
    hooks = [hook for hook in runner.hooks if isinstance(hook, LossHook)]
    for hook in hooks:
        hook.before_train(runner)
    try:
        return measure_curvature(runner.model, samples, seed=seed, **settings)
    finally:
        for hook in hooks:
            hook.after_train(runner)


def _build_training(
    experiment: Runnable, resume: str | None, load_from: str | None, hooks: Sequence[Hook]
) -> ConsoleRunner:
    cfg = experiment.config
    settings = _settings(cfg)
    given = cfg.get("load_from")
    if not resume and not load_from and cfg.get("resume"):
        resume = given or "auto"  # the command line says nothing, and the config does
    if resume == "auto":
        latest = latest_checkpoint(cfg.work_dir)
        resume = None if latest is None else str(latest)
        if resume is None:
            experiment.notes.append(f"{cfg.work_dir} holds no checkpoint yet: this is a new start.")
    if not resume and not load_from:
        load_from = given
    cfg.resume = resume is not None
    if resume:
        experiment.notes += _continued(Path(cfg.work_dir), resume, settings)
    cfg.load_from = resume or load_from
    saving = cfg.default_hooks.checkpoint
    if saving.get("max_keep_ckpts") == 1:
        saving.max_keep_ckpts = 2
        experiment.notes.append(
            "two checkpoints are kept, not one: the older one goes before the newer one is written."
        )
    runner = _build_runner(experiment)
    _check_data(experiment, runner)
    runner.register_hook(ExactResumeHook())
    if cfg.load_from:
        runner.register_hook(CheckpointGuardHook(cfg.load_from, strict=cfg.resume))
    runner.register_hook(HostMemoryHook())
    for hook in hooks:
        runner.register_hook(hook)
    if is_main_process() and not (resume and _in(resume, cfg.work_dir)):
        _begin(Path(cfg.work_dir), settings)
    runner.keep_config()
    return runner


def _settings(cfg: Config) -> str:
    """What tells whether a training goes on as it was started, as JSON."""
    content = {key: value for key, value in cfg.to_dict().items() if key not in _PLACE}
    return json.dumps(content, default=str, indent=1)


def _continued(work_dir: Path, checkpoint: str, settings: str) -> list[str]:
    """What a person should know about a training that goes on, a sentence each."""
    notes = [f"this goes on from {checkpoint}."]
    if not _in(checkpoint, work_dir):
        return notes
    with contextlib.suppress(OSError, ValueError):  # of another tool, or of an older version
        old = json.loads((work_dir / STARTED_FILE).read_text(encoding="utf-8"))
        others = differing(*(dict(flat(one)) for one in (old, json.loads(settings))))
        if others := [key for key in others if key.split(".")[0] not in _PLACE]:
            more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
            notes.append(
                f"this training was started with other settings of {', '.join(others[:_SHOWN])}"
                f"{more}; those given now hold."
            )
    return notes


def _in(checkpoint: str, work_dir: str | Path) -> bool:
    return Path(checkpoint).resolve().parent == Path(work_dir).resolve()


def _begin(work_dir: Path, settings: str) -> None:
    """Keep an earlier training's files out of what is read of the one that begins."""
    (work_dir / "last_checkpoint").unlink(missing_ok=True)
    for file in work_dir.glob(f"{KEPT_RESULTS}.*.json"):
        file.unlink()
    write_text(work_dir / STARTED_FILE, settings)


@contextlib.contextmanager
def _as_evaluated(runner: ConsoleRunner) -> Iterator[None]:
    """The model with the weights that an evaluation measures: averages, where a hook keeps some."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in hooks:
        hook.before_val_epoch(runner)
    try:
        yield
    finally:
        for hook in hooks:
            hook.after_val_epoch(runner)


def _check_data(experiment: Runnable, runner: ConsoleRunner) -> None:
    """Say what the training data is; refuse what would end the training after its first epoch."""
    cfg = runner.cfg
    try:
        loop = runner.train_loop
    except UserError as error:
        if is_empty(cfg):
            raise nothing_to_train_on(cfg) from error
        raise
    found = check_training_objects(loop.dataloader.dataset, cfg)
    if found is not None and is_main_process():
        print(f"training on {found}", flush=True)
    if runner.val_loop is not None:
        evaluator, loader = runner.val_loop.evaluator, runner.val_loop.dataloader
        experiment.check_metrics(evaluator.metrics, loader.dataset)
        experiment.keep_results(evaluator.metrics, Path(runner.work_dir) / KEPT_RESULTS)


def _load(experiment: Runnable, checkpoint: str) -> ConsoleRunner:
    experiment.config.load_from = checkpoint
    runner = _build_runner(experiment)
    runner.register_hook(CheckpointGuardHook(checkpoint, strict=True))
    return runner


def _build_runner(experiment: Runnable) -> ConsoleRunner:
    cfg = experiment.config
    if cfg.load_from and "://" not in cfg.load_from:
        check_checkpoint(cfg.load_from)
    for name in ("train", "val", "test"):
        loader = cfg.get(f"{name}_dataloader")
        if loader is not None:
            # See ExactResumeHook. Also, a finished Runner waits 5 s for each persistent worker.
            loader.persistent_workers = False
    if cfg.get("launcher") == "pytorch" and get_device() == "cpu":
        join_processes("pytorch")
        _wrap_without_gpu(cfg)
    runner = ConsoleRunner.from_cfg(cfg)
    if is_main_process():
        for note in experiment.notes:
            print(f"note: {note}")
        print(f"log: {_log_file(runner)}", flush=True)
    return runner


def _wrap_without_gpu(cfg: Config) -> None:
    """Wrap the model for processes on CPUs, as MMEngine does for processes on GPUs."""
    if cfg.get("model_wrapper_cfg") is None:
        cfg.model_wrapper_cfg = ConfigDict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )


def _report(runner: ConsoleRunner, tables: list[RenderableType], lines: dict[str, Any]) -> None:
    console = Console()
    for one in tables:
        console.print(one)
    for name, value in {**lines, "log": _log_file(runner)}.items():
        console.print(f"{name:11}{value}", highlight=False, soft_wrap=True)


def _log_file(runner: ConsoleRunner) -> Path:
    return _short(Path(runner.log_dir) / f"{runner.timestamp}.log")


def _short(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
