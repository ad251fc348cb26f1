"""Training and evaluating, from an experiment that is ready to the table."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2 import engine
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from rich.console import Console
from torch import nn

from polyfocal.coco import format_table
from polyfocal.data.files import write_text
from polyfocal.detectron2.checkpoint import check_checkpoint, only_data
from polyfocal.detectron2.data import CocoEvaluator, number_from_1
from polyfocal.detectron2.experiment import Evaluations, Experiment, Settings
from polyfocal.detectron2.prepare import prepare_experiment
from polyfocal.detectron2.progress import ProgressHook
from polyfocal.errors import UserError
from polyfocal.experiments.request import Request
from polyfocal.folders import own_folder

_LOGGERS = ("detectron2", "fvcore", "iopath")
_PROGRESS = "detectron2.utils.events"
_STARTED = "started.json"


def launch(
    request: Request,
    *,
    resume: bool,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Start the processes that train, or evaluate where the request is for no training.

    Args:
        request: What to train or evaluate.
        resume: See :func:`train` and :func:`test`.
        num_gpus: GPUs per machine.
        num_machines, machine_rank, dist_url: As ``detectron2.engine.launch`` takes them.

    Raises:
        UserError: The options contradict each other or the machine, and see :func:`train`.
    """
    for override in request.options:
        if override.startswith("--"):
            raise UserError(f"{override} stands behind an override: options come before them.")
    if num_gpus * num_machines > 1:
        if num_gpus > (found := torch.cuda.device_count()):
            raise UserError(f"--num-gpus {num_gpus}: torch finds {found} here.")
        prepare_experiment(request)  # what is wrong with it is better said once
    engine.launch(_run, num_gpus, num_machines, machine_rank, dist_url, (request, resume))


def _run(request: Request, resume: bool) -> None:
    (train if request.train else test)(prepare_experiment(request), resume=resume)


@only_data()
def train(experiment: Experiment, *, resume: bool = False) -> None:
    """Train and evaluate.

    Args:
        experiment: From :func:`polyfocal.detectron2.prepare.prepare_experiment`.
        resume: Continue from the last checkpoint of the output directory, if there is one.

    Raises:
        UserError: A part cannot be built, a checkpoint does not fit, or the loss is not finite.
    """
    settings = experiment.settings()
    if settings.amp and not torch.cuda.is_available():
        raise UserError("mixed precision needs a GPU, and torch finds none: train without it.")
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    model, evaluations = _build(experiment, settings)
    with _from_config("the optimizer"):
        optimizer = experiment.build_optimizer(model)
    with _from_config("the learning rate's schedule"):
        schedule = experiment.build_schedule(optimizer)
    output_dir = Path(settings.output_dir)
    last = DetectionCheckpointer(model, str(output_dir)).get_checkpoint_file() if resume else ""
    if last or settings.weights:
        check_checkpoint(last or settings.weights, model, strict=bool(last))
    with _own(experiment, output_dir, resume=resume), _log(experiment, output_dir):
        if resume and not last and comm.is_main_process():
            print(f"note: {output_dir} holds no checkpoint yet: this is a new start.")
        with _from_config("the data loader"):
            train_loader = experiment.build_train_loader()
        model = create_ddp_model(model, **settings.ddp)
        trainer = (AMPTrainer if settings.amp else SimpleTrainer)(model, train_loader, optimizer)
        checkpointer = DetectionCheckpointer(model, str(output_dir), trainer=trainer)
        trainer.register_hooks(
            [
                hooks.IterationTimer(),
                ProgressHook(),
                hooks.LRScheduler(scheduler=schedule),
                hooks.PeriodicCheckpointer(
                    checkpointer, settings.checkpoint_period, max_to_keep=settings.max_to_keep
                )
                if comm.is_main_process()
                else None,
                hooks.EvalHook(settings.eval_period, lambda: _evaluate(model, evaluations)),
                hooks.PeriodicWriter(
                    default_writers(str(output_dir), settings.max_iter), period=settings.log_period
                )
                if comm.is_main_process()
                else None,
            ]
        )
        checkpointer.resume_or_load(settings.weights, resume=resume)
        start = time.perf_counter()
        try:
            trainer.train(trainer.iter + 1 if last else 0, settings.max_iter)
        except FloatingPointError as error:
            raise UserError(
                f"the loss is no longer finite at step {trainer.iter}: train with a smaller"
                " learning rate."
            ) from error
        minutes, seconds = divmod(round(time.perf_counter() - start), 60)
        _report(
            evaluations,
            {
                "training": f"{minutes} min {seconds} s",
                "checkpoint": output_dir / "model_final.pth",
                "log": output_dir / "log.txt",
            },
        )


@only_data()
def test(experiment: Experiment, *, resume: bool = False) -> None:
    """Evaluate a checkpoint: the config's, or with ``resume`` the output directory's last one.

    Raises:
        UserError: There is no checkpoint, or it does not fit.
    """
    settings = experiment.settings()
    output_dir = Path(settings.output_dir)
    model, evaluations = _build(experiment, settings)
    if resume:
        _check_started(experiment, output_dir, data=False)
    checkpointer = DetectionCheckpointer(model, str(output_dir))
    weights = (checkpointer.get_checkpoint_file() if resume else "") or settings.weights
    if not weights:
        raise UserError(
            "--eval-only needs a checkpoint: train.init_checkpoint=FILE in a LazyConfig,"
            " MODEL.WEIGHTS FILE in yaml, or --resume for the last one of the output directory."
        )
    check_checkpoint(weights, model, strict=True)
    with _log(experiment, output_dir):
        checkpointer.load(weights, checkpointables=[])
        _evaluate(create_ddp_model(model, **settings.ddp), evaluations)
        _report(evaluations, {"checkpoint": weights, "log": output_dir / "log.txt"})


def _build(experiment: Experiment, settings: Settings) -> tuple[nn.Module, Evaluations]:
    """The model and its evaluations; the seed also decides the first weights of the model."""
    seed_all_rng(None if settings.seed < 0 else settings.seed + comm.get_rank())
    if settings.float32_precision:
        torch.set_float32_matmul_precision(settings.float32_precision)
        torch.backends.cudnn.allow_tf32 = settings.float32_precision != "highest"
    with _from_config("the model"):
        model = experiment.build_model().to(settings.device)
    with _from_config("the evaluation"):
        evaluations = experiment.build_evaluations()
    for _, evaluators in evaluations.values():
        for evaluator in evaluators:
            number_from_1(evaluator)
    return model, evaluations


def _evaluate(model: nn.Module, evaluations: Evaluations) -> dict[str, Any]:
    """The numbers of each data set, by its name if there are several, as in Detectron2."""
    measured: dict[str, Any] = {}
    for name, (loader, evaluators) in evaluations.items():
        numbers = measured[name] = inference_on_dataset(model, loader, evaluators)
        if comm.is_main_process():
            print_csv_format(numbers)
            shown = [f"{kind} AP {values['AP']:.1f}" for kind, values in numbers.items()]
            logging.getLogger(_PROGRESS).info("evaluation: %s", ", ".join(shown))
    return measured if len(measured) > 1 else next(iter(measured.values()))


def _report(evaluations: Evaluations, lines: dict[str, Any]) -> None:
    if not comm.is_main_process():
        return
    console = Console()
    for name, (_, evaluators) in evaluations.items():
        if len(evaluations) > 1:
            console.print(name, highlight=False)
        for evaluator in evaluators:
            if isinstance(evaluator, CocoEvaluator):
                console.print(format_table(evaluator.coco_results))
    for name, value in lines.items():
        console.print(f"{name:11}{value}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _own(experiment: Experiment, output_dir: Path, *, resume: bool) -> Iterator[None]:
    """Keep other trainings out of the output directory, earlier ones and simultaneous ones."""
    if not comm.is_main_process():
        yield
        return
    with own_folder(output_dir, experiment.OUTPUT):
        _check_started(experiment, output_dir, data=True)
        write_text(output_dir / _STARTED, json.dumps(_told_apart_by(experiment), indent=1))
        if not resume:
            # A later --resume must continue this run and not the one before.
            (output_dir / "last_checkpoint").unlink(missing_ok=True)
        yield


def _told_apart_by(experiment: Experiment) -> dict[str, Any]:
    train, _ = experiment.datasets()
    text = experiment.path.read_text(encoding="utf-8")
    return {"config": str(experiment.path.resolve()), "text": text, "train": train}


def _check_started(experiment: Experiment, output_dir: Path, *, data: bool) -> None:
    """Refuse the output directory of a training of another config or, if asked, on other data."""
    if not any(output_dir.glob("*.pth")):
        return
    try:
        other = json.loads((output_dir / _STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # of an older version, or of Detectron2's own tools
    mine = _told_apart_by(experiment)
    if other["config"] != mine["config"] and other["text"] != mine["text"]:
        what = f"of {other['config']}"
    elif data and other["train"] != mine["train"]:
        what = f"on {', '.join(other['train'])}"
    else:
        return
    raise UserError(
        f"{output_dir} holds another training, {what}: give another {experiment.OUTPUT}, or delete"
        " the folder."
    )


@contextlib.contextmanager
def _from_config(part: str) -> Iterator[None]:
    """A failure in the block is an error of the config and becomes one sentence."""
    try:
        # Detectron2 itself prints the class that fails on the console.
        logging.disable(logging.ERROR)
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = " ".join(str(error).split())
        raise UserError(f"{part} cannot be built: {sentence}") from error
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _log(experiment: Experiment, output_dir: Path) -> Iterator[None]:
    """Log everything to a file; on the main process, progress and warnings to the console."""
    handlers: list[logging.Handler] = []
    if comm.is_main_process():
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(output_dir / "log.txt", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{output_dir} cannot be written: {error.strerror}.") from error
        file.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s"))
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        console.addFilter(lambda r: r.name == _PROGRESS or r.levelno >= logging.WARNING)
        handlers = [file, console]
        for note in experiment.notes:
            print(f"note: {note}")
        print(f"log: {output_dir / 'log.txt'}", flush=True)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        loggers[0].info("Environment:\n%s", collect_env_info())
        loggers[0].info("Config:\n%s", experiment.dump())
        yield
    finally:
        for logger, old_handlers, level, propagate in before:
            logger.handlers, logger.level, logger.propagate = old_handlers, level, propagate
        for handler in handlers:
            handler.close()
