"""What the experiments of all of MMEngine's frameworks share: a config, and how it is run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from rich.console import RenderableType

from polyfocal.errors import UserError
from polyfocal.experiments.request import Setting, Watcher
from polyfocal.mmengine import runs, search
from polyfocal.mmengine.configs import read_config


@dataclass
class Experiment:
    """A config that is ready to run, and what a person should know about how it came to be.

    See :class:`polyfocal.experiments.request.Experiment`.
    """

    config: Config
    notes: list[str] = field(default_factory=list)

    per_cent: ClassVar[float] = 100.0

    @property
    def quality(self) -> list[str]:
        raise NotImplementedError

    @property
    def epochs(self) -> int:
        return search.epochs_of(self.config)

    def content(self) -> str:
        return read_config(self.config.filename).pretty_text

    def settings(self) -> dict[str, Setting]:
        return search.settings_of(self.config)

    def use_values(self, values: Mapping[str, float]) -> None:
        search.use_values(self.config, values)

    def use_epochs(self, epochs: int) -> None:
        search.use_epochs(self.config, epochs)

    def hold_out(self, folder: Path) -> None:
        """Train on four fifths of the training split, and evaluate on the others, not on val.

        Args:
            folder: Where what tells the two parts apart goes.

        Raises:
            UserError: The training split cannot be divided.
        """
        raise NotImplementedError

    def measure(
        self, place: Path, *, seed: int, watchers: Sequence[Watcher] = (), resume: bool = False
    ) -> dict[str, float]:
        self.config.randomness = {"seed": seed}
        hooks = [search.WatcherHook(watcher) for watcher in watchers]
        return runs.train_into(place, self, hooks=hooks, resume=resume)

    def set_up(self, work_dir: str | None, launcher: str = "none", local_rank: int = 0) -> None:
        """See :func:`polyfocal.mmengine.runs.set_up`."""
        runs.set_up(self.config, work_dir=work_dir, launcher=launcher, local_rank=local_rank)

    def train(self, **settings: Any) -> dict[str, float]:
        """See :func:`polyfocal.mmengine.runs.train`."""
        return runs.train(self, **settings)

    def test(self, checkpoint: str, **settings: Any) -> dict[str, float]:
        """See :func:`polyfocal.mmengine.runs.test`."""
        return runs.test(self, checkpoint, **settings)

    def write_variant(
        self, file: Path, values: Mapping[str, float], comment: Sequence[str]
    ) -> None:
        search.write_variant(file, Path(self.config.filename), values, comment)

    def tables(self, metrics: list[BaseMetric]) -> list[RenderableType]:
        """What an evaluation found, to print; nothing where there was none yet."""
        own = [metric for metric in metrics if hasattr(metric, "table")]
        return [table for metric in own if (table := metric.table()) is not None]

    def check_metrics(self, metrics: list[BaseMetric], dataset: Any) -> None:
        """Look at built metrics before they are used, not after an epoch.

        Raises:
            UserError: They will have no ground truth, or a hook waits for what none measures.
        """

    def keep_results(self, metrics: list[BaseMetric], prefix: Path) -> None:
        """Have the evaluations of a training leave their detections as ``prefix.bbox.json``."""

    def draw(self, runner: Runner) -> Path | None:
        """Draw predictions of the trained model beside the ground truth.

        Returns:
            The folder, None where nothing is drawn.
        """
        return None

    def keep_detections(self, out: str) -> list[BaseMetric]:
        """Have a test write its detections; returns metrics to evaluate beside the config's.

        Raises:
            UserError: It has none to write, or not under such a name.
        """
        raise UserError("--out writes detections, and this config is for a classifier.")

    def draw_all(self, folder: str) -> None:
        """Have a test draw every sample, truth and prediction, into a folder below the run's."""
        raise UserError("--show-dir draws detections, and this config is for a classifier.")

    def use_tta(self) -> None:
        """Put the model behind its framework's test-time augmentation.

        Raises:
            UserError: There is none for the model.
        """
        raise UserError("--tta is for detectors, and this config is for a classifier.")

    def use_seed(self, seed: int | None) -> None:
        """The seed of everything random; None for the config's, or 0."""
        randomness = {"seed": None, **self.config.get("randomness", {})}
        if seed is not None or randomness["seed"] is None:
            randomness["seed"] = seed or 0
        self.config.randomness = randomness

    def use_mixed_precision(self) -> None:
        """Train in mixed precision.

        Raises:
            UserError: There is no GPU.
        """
        if not torch.cuda.is_available():
            raise UserError("--amp needs a GPU, and torch finds none: train without it.")
        self.config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")

    def scale_learning_rate(self) -> None:
        """Scale the learning rate to the number of devices and the batch size.

        Raises:
            UserError: The config does not say from which batch size.
        """
        if "base_batch_size" not in self.config.get("auto_scale_lr", {}):
            raise UserError(
                f"--auto-scale-lr needs auto_scale_lr.base_batch_size in {self.config.filename}."
            )
        self.config.auto_scale_lr.enable = True

    def log_for_tensorboard(self) -> None:
        """Log for TensorBoard too."""
        self.config.visualizer.vis_backends.append({"type": "TensorboardVisBackend"})
