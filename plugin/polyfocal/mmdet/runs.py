"""Training and testing a detector, from a ready config to the table and the pictures."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, init_dist, is_distributed, is_main_process
from mmengine.hooks import Hook
from rich.console import Console, RenderableType

from polyfocal.folders import own_folder
from polyfocal.mmdet.experiment import Experiment
from polyfocal.mmdet.metrics import CocoMetric
from polyfocal.mmengine.checkpoint import (
    CheckpointGuardHook,
    check_checkpoint,
    latest_checkpoint,
    only_data,
)
from polyfocal.mmengine.console import ConsoleRunner, HostMemoryHook, ProgressBarHook
from polyfocal.mmengine.curvature import Curvature, fixed_batches, measure_curvature
from polyfocal.mmengine.hooks import ExactResumeHook
from polyfocal.mmengine.work_dir import KEPT_RESULTS


@only_data()
def train(
    experiment: Experiment,
    *,
    resume: str | None = None,
    load_from: str | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Train, evaluate on the val split, and draw predictions beside the ground truth.

    The detections of the last evaluation stay in the work directory as COCO results.

    Args:
        experiment: From :func:`polyfocal.mmdet.command_line.prepare_experiment`, with a
            ``work_dir``.
        resume: A checkpoint to go on from, or ``"auto"`` for the work directory's last one.
        load_from: A checkpoint to take weights from; those that do not fit are left out.
        hooks: To register beside the config's. What they raise ends the training.

    Returns:
        What the last evaluation measured, by the metrics' names.

    Raises:
        UserError: The config or a checkpoint does not fit, or the work directory cannot be written
            or is another training's.
    """
    bar = ProgressBarHook()
    with own_folder(Path(experiment.config.work_dir), "--work-dir"):
        runner = _build_training(experiment, resume, load_from, [bar, *hooks])
        start = time.perf_counter()
        try:
            runner.train()
            evaluated = [bool(experiment.tables(runner.val_evaluator.metrics))]
            broadcast_object_list(evaluated)  # only the main process holds the tables
            if not evaluated[0]:
                # Resumed at its end: there was nothing left to train.
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
        pictures = experiment.draw(runner)
        if pictures is not None:
            lines["pictures"] = _short(pictures)
        _report(runner, experiment.tables(runner.val_evaluator.metrics), lines)
        return measured


@only_data()
def test(
    experiment: Experiment, checkpoint: str, *, more_metrics: list[Any] | None = None
) -> dict[str, float]:
    """Evaluate a checkpoint on the test data of a config; ``--data`` makes that the val split.

    Args:
        experiment: From :func:`polyfocal.mmdet.command_line.prepare_experiment`, with a
            ``work_dir``.
        checkpoint: A file or an address that MMEngine knows.
        more_metrics: Metrics to fill beside the config's, such as MMDetection's ``DumpDetResults``.

    Returns:
        What was measured, by the metrics' names.

    Raises:
        UserError: The config or the checkpoint does not fit.
    """
    runner = _load(experiment, checkpoint)
    runner.test_evaluator.metrics.extend(more_metrics or [])
    bar = ProgressBarHook()
    runner.register_hook(bar)
    try:
        measured = runner.test()
    finally:
        bar.close()
    if is_main_process():
        _report(runner, experiment.tables(runner.test_evaluator.metrics), {})
    return measured


def join_processes(launcher: str) -> None:
    """Let the processes that train together speak to each other before there is a runner.

    Args:
        launcher: How they were started, ``"none"`` where there is one. With ``"pytorch"`` they may
            be without GPUs.
    """
    if launcher == "none" or is_distributed():
        return
    if launcher == "pytorch" and get_device() == "cpu":
        torch.distributed.init_process_group("gloo")
    else:
        init_dist(launcher)


@only_data()
def curvature(
    experiment: Experiment, checkpoint: str, *, batches: int, seed: int = 0, **settings: Any
) -> Curvature:
    """Measure the curvature of the training loss at the weights of a checkpoint.

    Args:
        experiment: From :func:`polyfocal.mmdet.experiment.prepare_experiment`, with a ``work_dir``.
        checkpoint: A file.
        batches: Batches of the training data.
        seed: Of the choice of pictures and of the probes.
        settings: See :func:`polyfocal.mmengine.curvature.measure_curvature`.

    Raises:
        UserError: The config or the checkpoint does not fit, or a setting.
    """
    runner = _load(experiment, checkpoint)
    meta = runner.load_checkpoint(checkpoint).get("meta", {})
    loop = runner.train_loop
    # What a loss with a schedule looks at; a checkpoint without a date is taken for the end.
    runner.message_hub.update_info("max_iters", loop.max_iters)
    done = min(meta.get("iter", loop.max_iters), loop.max_iters)
    runner.message_hub.update_info("iter", max(0, done - 1))
    samples = fixed_batches(loop.dataloader, batches, seed)
    return measure_curvature(runner.model, samples, seed=seed, **settings)


def _build_training(
    experiment: Experiment, resume: str | None, load_from: str | None, hooks: Sequence[Hook]
) -> ConsoleRunner:
    cfg = experiment.config
    if resume == "auto":
        latest = latest_checkpoint(cfg.work_dir)
        resume = None if latest is None else str(latest)
        if resume is None:
            experiment.notes.append(f"{cfg.work_dir} holds no checkpoint yet: this is a new start.")
    cfg.resume = resume is not None
    cfg.load_from = resume or load_from
    saving = cfg.default_hooks.checkpoint
    if saving.get("max_keep_ckpts") == 1:
        saving.max_keep_ckpts = 2
        experiment.notes.append(
            "two checkpoints are kept, not one: the older one goes before the newer one is written."
        )
    runner = _build_runner(experiment)
    runner.register_hook(ExactResumeHook())
    if cfg.load_from:
        runner.register_hook(CheckpointGuardHook(cfg.load_from, strict=cfg.resume))
    runner.register_hook(HostMemoryHook())
    for metric in runner.val_evaluator.metrics:
        if isinstance(metric, CocoMetric) and metric.outfile_prefix is None:
            metric.outfile_prefix = str(Path(runner.work_dir) / KEPT_RESULTS)
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def _load(experiment: Experiment, checkpoint: str) -> ConsoleRunner:
    experiment.config.load_from = checkpoint
    runner = _build_runner(experiment)
    runner.register_hook(CheckpointGuardHook(checkpoint, strict=True))
    return runner


def _build_runner(experiment: Experiment) -> ConsoleRunner:
    cfg = experiment.config
    if cfg.load_from and "://" not in cfg.load_from:
        check_checkpoint(cfg.load_from)
    for name in ("train", "val", "test"):
        loader = cfg.get(f"{name}_dataloader")
        if loader is not None:
            # See ExactResumeHook; and a Runner that is done with waits 5 s for each kept worker.
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
    """What MMEngine's model wrapper does for a GPU, for a process on a CPU."""
    if cfg.get("model_wrapper_cfg") is None:
        cfg.model_wrapper_cfg = ConfigDict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )


def _report(runner: ConsoleRunner, tables: list[RenderableType], lines: dict[str, Any]) -> None:
    console = Console()
    for table in tables:
        console.print(table)
    for name, value in {**lines, "log": _log_file(runner)}.items():
        console.print(f"{name:11}{value}", highlight=False, soft_wrap=True)


def _log_file(runner: ConsoleRunner) -> Path:
    return _short(Path(runner.log_dir) / f"{runner.timestamp}.log")


def _short(path: Path) -> Path:
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
