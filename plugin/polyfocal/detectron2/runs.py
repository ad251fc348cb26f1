"""Training and evaluating, from an experiment that is ready to the table."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import AMPTrainer, SimpleTrainer, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from rich.console import Console
from torch import nn

from polyfocal.coco import format_table
from polyfocal.detectron2.checkpoint import check_checkpoint, only_data
from polyfocal.detectron2.data import CocoEvaluator
from polyfocal.detectron2.experiment import Experiment
from polyfocal.detectron2.progress import ProgressHook
from polyfocal.errors import UserError

_LOGGERS = ("detectron2", "fvcore", "iopath")
_PROGRESS = "detectron2.utils.events"


@only_data()
def train(experiment: Experiment, *, resume: bool = False) -> None:
    """Train and evaluate.

    Args:
        experiment: From :func:`polyfocal.detectron2.prepare.prepare_experiment`.
        resume: Go on from the last checkpoint of the output directory, where there is one.

    Raises:
        UserError: A part cannot be built, a checkpoint does not fit, or the loss is not finite.
    """
    settings = experiment.settings()
    if settings.amp and not torch.cuda.is_available():
        raise UserError("mixed precision needs a GPU, and torch finds none: train without it.")
    with _from_config("the model"):
        model = experiment.build_model().to(settings.device)
    with _from_config("the optimizer"):
        optimizer = experiment.build_optimizer(model)
    with _from_config("the learning rate's schedule"):
        schedule = experiment.build_schedule(optimizer)
    with _from_config("the evaluator"):
        evaluator = experiment.build_evaluator()
    output_dir = Path(settings.output_dir)
    last = DetectionCheckpointer(model, str(output_dir)).get_checkpoint_file() if resume else ""
    if last or settings.weights:
        check_checkpoint(last or settings.weights, model, strict=bool(last))
    with _log(experiment, output_dir):
        seed_all_rng(None if settings.seed < 0 else settings.seed + comm.get_rank())
        if resume and not last and comm.is_main_process():
            print(f"note: {output_dir} holds no checkpoint yet: this is a new start.")
        with _from_config("the data loader"):
            train_loader = experiment.build_train_loader()
            test_loader = experiment.build_test_loader()
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
                hooks.EvalHook(
                    settings.eval_period, lambda: _evaluate(model, test_loader, evaluator)
                ),
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
            evaluator,
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
    with _from_config("the model"):
        model = experiment.build_model().to(settings.device)
    with _from_config("the evaluator"):
        evaluator = experiment.build_evaluator()
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
        with _from_config("the data loader"):
            test_loader = experiment.build_test_loader()
        _evaluate(create_ddp_model(model, **settings.ddp), test_loader, evaluator)
        _report(evaluator, {"checkpoint": weights, "log": output_dir / "log.txt"})


def _evaluate(model: nn.Module, loader: Any, evaluator: DatasetEvaluator) -> dict[str, Any]:
    numbers = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(numbers)
        shown = [f"{kind} AP {values['AP']:.1f}" for kind, values in numbers.items()]
        logging.getLogger(_PROGRESS).info("evaluation: %s", ", ".join(shown))
    return numbers


def _report(evaluator: DatasetEvaluator, lines: dict[str, Any]) -> None:
    if not comm.is_main_process():
        return
    console = Console()
    if isinstance(evaluator, CocoEvaluator):
        console.print(format_table(evaluator.coco_results))
    for name, value in lines.items():
        console.print(f"{name:11}{value}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _from_config(part: str) -> Iterator[None]:
    """What fails here is the config's error and becomes one sentence."""
    try:
        # Detectron2 logs the failing class on a console of its own.
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
    """Everything to a file; to the console progress and warnings, on the main process."""
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
