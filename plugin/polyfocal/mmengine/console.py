"""What a person sees while a model trains: a bar on a terminal, plain lines elsewhere, no dumps."""

import contextlib
import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mmengine.device import is_cuda_available
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch.utils.data import DataLoader

from polyfocal.errors import UserError
from polyfocal.mmengine.checkpoint import written_whole

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

_LOSS_WINDOW = 50  # iterations over which the shown losses are averaged


class ConsoleRunner(Runner):
    """A Runner whose console is for people.

    The dumps of the config, the environment and the hooks go to the log file only. The console gets
    warnings and, if it is no terminal, the lines of the progress log. A checkpoint is on the
    disk whole or not at all, whenever the run is killed. A process may start several Runners in one
    second: each has its own log folder.

    Raises:
        UserError: A part cannot be built from its config.
    """

    _starts: ClassVar[Counter[str]] = Counter()

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Set the environment up and name this start.

        MMEngine names a start by its second. Runners of the same name share their scalars and their
        visualizer, and the later Runner writes into the folder of the earlier one.
        """
        super().setup_env(env_cfg)
        earlier = self._starts[self._timestamp]
        self._starts[self._timestamp] += 1
        if earlier:
            self._timestamp += f"_{earlier}"

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Make the run's logger, with a console handler that lets only progress through."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(_is_for_people)
        return logger

    def dump_config(self) -> None:
        """Do not write yet: a Runner that only tests must leave a training's config as it is.

        :meth:`keep_config` writes it for a training. Each start has its config beside its log.
        """

    def keep_config(self) -> None:
        """Write the config into the work directory, as MMEngine does for every Runner."""
        super().dump_config()

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint under another name, then give it its own.

        Raises:
            UserError: It cannot be written, as on a full disk.
        """
        if "://" in out_dir or not is_main_process():  # an object store keeps no half-written file
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        with written_whole(Path(out_dir, filename)) as part:
            super().save_checkpoint(out_dir, part.name, *args, **kwargs)

    def build_model(self, model: Any) -> Any:
        with _from_config("the model"):
            return super().build_model(model)

    def build_train_loop(self, loop: Any) -> BaseLoop:
        with _from_config("the training loop"):
            return super().build_train_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        with _from_config("the optimizer"):
            return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        with _from_config("the learning rate's schedule"):
            return super().build_param_scheduler(scheduler)

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        with _from_config("the data loader"):
            return Runner.build_dataloader(*args, **kwargs)

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """Build a visualizer for this run; by the usual name MMEngine may give an earlier run's."""
        if isinstance(visualizer, dict):
            visualizer = {**visualizer, "name": self.experiment_name}
        return super().build_visualizer(visualizer)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        with _from_config("the evaluator"):
            return super().build_evaluator(evaluator)


class _BuildError(UserError):
    """A part of a run cannot be built from its config."""


@contextlib.contextmanager
def _from_config(part: str) -> Iterator[None]:
    """Silence pycocotools' chatter; a failure is an error of the config and becomes a sentence."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except _BuildError:  # a part of this part
        raise
    except Exception as error:
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        sentence = cause.args[0] if isinstance(cause, KeyError) else cause
        raise _BuildError(f"{part} cannot be built: {sentence}") from error


class ProgressBarHook(Hook):
    """A bar with the time left and the current losses; it does nothing without a terminal."""

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._losses = Text(no_wrap=True, overflow="ellipsis", style="dim")
        self.evaluated = False  # whether there was an evaluation
        self._live = Live(Group(self._bar, self._losses))

    def before_train(self, runner: Runner) -> None:
        """Show the bar; after a resume it starts where the run had stopped."""
        self._show("training", total=runner.max_iters, completed=runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the bar on by one iteration."""
        self._bar.update(
            self._task,
            completed=runner.iter + 1,
            description=f"epoch {runner.epoch + 1}/{runner.max_epochs}",
        )
        self._losses.plain = "  ".join(
            f"{name.removeprefix('train/')} {history.mean(_LOSS_WINDOW):.3f}"
            for name, history in runner.message_hub.log_scalars.items()
            if name.startswith("train/loss")
        )

    def before_val(self, runner: Runner) -> None:
        """Show a second bar for the evaluation."""
        self._val_task = self._bar.add_task("evaluating", total=len(runner.val_dataloader))

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the evaluation's bar on by one batch."""
        self._bar.advance(self._val_task)

    def after_val(self, runner: Runner) -> None:
        """Take the evaluation's bar away."""
        self._bar.remove_task(self._val_task)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Leave a line with the mean average precision or the accuracy above the bar."""
        self.evaluated = True
        shown = [
            f"{k.split('/')[-1]} {v:.3f}"
            for k, v in (metrics or {}).items()
            if k.endswith(("mAP", "/top1"))
        ]
        if shown and self._live.is_started:
            self._live.console.print(f"epoch {runner.epoch}: {'  '.join(shown)}")

    def before_test(self, runner: Runner) -> None:
        """Show the bar of a test."""
        self._show("testing", total=len(runner.test_dataloader))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Move the bar on by one batch."""
        self._bar.advance(self._task)

    def close(self) -> None:
        """Give the terminal back, also after an interrupted training."""
        self._live.stop()

    def _show(self, description: str, **progress: Any) -> None:
        self._task = self._bar.add_task(description, **progress)
        if on_terminal() and is_main_process():
            self._live.start()


class HostMemoryHook(Hook):
    """Logs the most memory that the process has used, in MiB, if there is no GPU."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Update the number."""
        if resource is not None and not is_cuda_available():
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            unit = 2**20 if sys.platform == "darwin" else 2**10
            runner.message_hub.update_scalar("train/memory", peak // unit)


def on_terminal() -> bool:
    """Whether a person is watching standard output."""
    return sys.stdout.isatty()


def _is_for_people(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING:
        # MMEngine itself uses deprecated names of MMEngine, and warns.
        return "will be deprecated" not in record.getMessage()
    progress = record.module == "logger_hook" and not record.getMessage().startswith("Exp name")
    return progress and not on_terminal()
