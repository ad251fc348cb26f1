"""What the experiments of all of MMEngine's frameworks share: a config, and how it is run."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from rich.console import RenderableType

from polyfocal.data.files import write_text
from polyfocal.errors import UserError
from polyfocal.experiments.request import Setting, Watcher
from polyfocal.losses import Range
from polyfocal.mmengine import logs, runs, search
from polyfocal.mmengine.configs import class_of, content_of, is_new_style, read_config, type_name
from polyfocal.mmengine.statistics import ClassStatisticsHook


@dataclass
class Experiment:
    """A config that is ready to run, and what a person should know about how it was prepared.

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
        cfg = self.config
        whole = cfg.train_cfg.get("max_epochs")
        if whole is None:
            raise UserError(f"{cfg.filename} has no train_cfg.max_epochs: a trial is some epochs.")
        return whole

    def content(self) -> str:
        return content_of(self.config.filename)

    def settings(self) -> dict[str, Setting]:
        cfg = self.config
        scope = cfg.get("default_scope")
        places = search.innermost_losses(cfg)
        nodes = list(places.values())
        kinds = sorted({type_name(node) for node in nodes})
        if len({class_of(node, MODELS, scope) for node in nodes}) > 1:
            raise UserError(
                f"{cfg.filename} has heads with different losses, {' and '.join(kinds)}: a search "
                "is for one."
            )
        try:
            with DefaultScope.overwrite_default_scope(scope):
                loss = MODELS.build(nodes[0])
        except Exception as error:  # a config can name any class and give it anything
            raise UserError(f"the loss of {cfg.filename} cannot be built: {error}") from error
        if not hasattr(loss, "tunable"):
            raise UserError(
                f"the classification loss of {cfg.filename} is {kinds[0]}, which declares nothing "
                "to search: expected one of polyfocal's, such as type='polyfocal.FocalLoss'."
            )
        found = {}
        for name, range_ in loss.tunable().items():
            value = search.value_of(loss, nodes[0], name)
            # None and a number per class are decisions that a search for one number does not take.
            if not isinstance(value, int | float) or (range_.log and value <= 0):
                continue
            # The config's own value is the first trial: it is always within.
            low, high = min(range_.low, value), max(range_.high, value)
            options = tuple(f"{place}.{name}" for place in places)
            found[name] = Setting(float(value), Range(low, high, range_.log), options)
        return found

    def use_values(self, values: Mapping[str, float]) -> None:
        for loss in search.innermost_losses(self.config).values() if values else ():
            for name, value in values.items():
                key, _, place = name.partition(".")
                if place:
                    loss[key] = [
                        value if j == int(place) else old for j, old in enumerate(loss[key])
                    ]
                else:
                    loss[key] = value

    def use_epochs(self, epochs: int) -> None:
        cfg = self.config
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

    def hold_out(self, folder: Path) -> None:
        raise NotImplementedError

    def measure(
        self, place: Path, *, seed: int, watchers: Sequence[Watcher] = (), resume: bool = False
    ) -> dict[str, float]:
        self.use_seed(seed)
        hooks = [search.WatcherHook(watcher) for watcher in watchers]
        return runs.train_into(place, self, hooks=hooks, resume=resume)

    def write_variant(
        self, file: Path, values: Mapping[str, float], comment: Sequence[str]
    ) -> None:
        config = Path(self.config.filename)
        old, new = read_config(config), read_config(config)
        Experiment(new).use_values(values)
        lines = [f"# {line}" for one in comment for line in textwrap.wrap(one, 98)]
        if is_new_style(old):  # which cannot be a _base_ of the old style
            text = new.pretty_text
        else:
            base = os.path.relpath(config.resolve(), file.parent.resolve())
            lines.append(f"_base_ = {Path(base).as_posix()!r}")
            changed = search.changed(old.model.to_dict(), new.model.to_dict())
            text = Config({"model": changed}).pretty_text
        write_text(file, "\n".join(lines) + f"\n{text}")

    def tables(self, metrics: list[BaseMetric]) -> list[RenderableType]:
        """What an evaluation found, to print; nothing where there was none yet."""
        own = [metric for metric in metrics if hasattr(metric, "table")]
        return [table for metric in own if (table := metric.table()) is not None]

    def check_metrics(self, metrics: list[BaseMetric], dataset: Any) -> None:
        """Check built metrics before they are used, not after an epoch.

        Raises:
            UserError: They will have no ground truth, or a hook waits for a number that no metric
                measures.
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
            UserError: There are no detections to write, or not under such a name.
        """
        raise UserError("--out writes detections, and this config is for a classifier.")

    def draw_all(self, folder: str) -> None:
        """Have a test draw every sample, truth and prediction, into a folder below the run's."""
        raise UserError("--show-dir draws detections, and this config is for a classifier.")

    def use_thresholds(self, file: str) -> None:
        """Have a test measure and draw at score thresholds per class.

        Args:
            file: What ``tools/calibration.py --thresholds`` wrote.

        Raises:
            UserError: It is none, or nothing here takes it.
        """
        raise UserError("--thresholds is for detectors of pictures, and this config is for others.")

    def use_tta(self) -> None:
        """Put the model behind its framework's test-time augmentation.

        Raises:
            UserError: There is none for the model.
        """
        raise UserError("--tta is for detectors, and this config is for a classifier.")

    def use_seed(self, seed: int | None) -> None:
        """The seed of everything random; None for the config's, or 0.

        Raises:
            UserError: It is none.
        """
        randomness = {"seed": None, **self.config.get("randomness", {})}
        if seed is not None or randomness["seed"] is None:
            randomness["seed"] = seed or 0
        if not (isinstance(randomness["seed"], int) and 0 <= randomness["seed"] < 2**32):
            raise UserError(
                f"seed is {randomness['seed']!r}: expected a whole number from 0 to {2**32 - 1}."
            )
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
            UserError: The config does not say for which batch size its learning rate is.
        """
        if "base_batch_size" not in self.config.get("auto_scale_lr", {}):
            raise UserError(
                f"--auto-scale-lr needs auto_scale_lr.base_batch_size in {self.config.filename}."
            )
        self.config.auto_scale_lr.enable = True

    def log_to(self, names: Sequence[str]) -> None:
        """Log for other programs too, the statistics of the losses and AP by class with the rest.

        Args:
            names: See :func:`polyfocal.mmengine.logs.log_to`.

        Raises:
            PackageError: A package is missing.
        """
        logs.log_to(self.config, names)
        hooks = self.config.get("custom_hooks") or []
        if all(type_name(hook) != ClassStatisticsHook.__name__ for hook in hooks):
            self.config.custom_hooks = [
                *hooks,
                ConfigDict(type=f"polyfocal.{ClassStatisticsHook.__name__}"),
            ]
