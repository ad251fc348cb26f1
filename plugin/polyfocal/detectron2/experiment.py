"""What a config is to the tool, whichever of Detectron2's two kinds it is of."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from polyfocal.errors import UserError

TINY_EPOCHS = 8
TINY_BATCH = 4

_COCO_TRAIN = 117_266  # pictures with objects in COCO 2017's train split
_EVALUATIONS = 3
_CHECKPOINTS = 12


@dataclass
class Data:
    """A data set that takes the place of the config's.

    Attributes:
        train: Name of the train split in Detectron2's catalogs; empty where it is not needed.
        val: Name of the val split.
        num_train: Pictures with objects in the train split.
        num_classes: Number of classes.
        max_dets: Most detections a picture that are to be kept and counted.
    """

    train: str
    val: str
    num_train: int
    num_classes: int
    max_dets: int


@dataclass
class Settings:
    """What a run needs to know beside the parts that it builds.

    Attributes:
        output_dir: Where the log and the checkpoints go.
        weights: A checkpoint to start from, or empty.
        max_iter: Number of training steps.
        eval_period: Steps between evaluations; 0 evaluates at the end only.
        checkpoint_period: Steps between checkpoints.
        max_to_keep: Number of checkpoints that stay.
        log_period: Steps between the lines of the log.
        amp: Mixed precision.
        device: Where the model goes.
        seed: Of everything random; negative for another one in each run.
        ddp: Keywords of DistributedDataParallel.

    Raises:
        UserError: A number is none or out of its range.
    """

    output_dir: str
    weights: str
    max_iter: int
    eval_period: int
    checkpoint_period: int
    max_to_keep: int
    log_period: int
    amp: bool
    device: str
    seed: int
    ddp: dict[str, Any]

    def __post_init__(self) -> None:
        least = {"max_iter": 1, "eval_period": 0, "checkpoint_period": 1, "log_period": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(
                    f"the config has {value!r} as {name}: expected a whole number >= {low}"
                )


class Experiment(ABC):
    """A config of Detectron2: it can be adapted, and then its parts can be built.

    Args:
        path: The config file, for the sentences of errors.

    Attributes:
        notes: What a person should know about how it was adapted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether the model predicts masks."""

    @abstractmethod
    def use_tiny_profile(self, side: int) -> None:
        """Take the CPU-sized version of the model and its recipe; pictures of at most ``side``."""

    @abstractmethod
    def use_data(self, data: Data, *, tiny: bool) -> None:
        """Train and evaluate on ``data``, for as many passes as before (8 if tiny)."""

    @abstractmethod
    def no_flip(self) -> None:
        """Mirror no picture."""

    @abstractmethod
    def override(self, options: Sequence[str]) -> None:
        """Apply the overrides of the command line.

        Raises:
            UserError: One of them does not fit the config.
        """

    @abstractmethod
    def datasets(self) -> tuple[list[str], list[str]]:
        """Names of the data sets for training and for evaluation."""

    @abstractmethod
    def settings(self) -> Settings:
        """The settings, after everything."""

    @abstractmethod
    def dump(self) -> str:
        """The whole config as a text for people."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build the model, on the CPU."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of a model."""

    @abstractmethod
    def build_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build the learning rate's schedule, as Detectron2's hook for it takes it."""

    @abstractmethod
    def build_train_loader(self) -> Iterable[Any]:
        """Build the endless loader of training batches."""

    @abstractmethod
    def build_test_loader(self) -> Iterable[Any]:
        """Build the loader of the evaluation's batches."""

    @abstractmethod
    def build_evaluator(self) -> DatasetEvaluator:
        """Build what counts the detections."""


def iterations(num_pictures: int, batch: int, epochs: float) -> int:
    """Number of steps of so many passes over a data set."""
    return max(1, round(epochs * num_pictures / batch))


def passes_on_coco(max_iter: int, batch: int) -> float:
    """Number of passes over COCO 2017 that a schedule of Detectron2's means."""
    return max_iter * batch / _COCO_TRAIN


def periods(max_iter: int) -> tuple[int, int]:
    """Steps between evaluations and between checkpoints of a short training."""
    return -(-max_iter // _EVALUATIONS), -(-max_iter // _CHECKPOINTS)


def default_output_dir(output_dir: str, path: Path) -> str:
    """Detectron2's default is one folder for all configs; here each has its own."""
    if Path(output_dir) == Path("output"):
        return str(Path("work_dirs") / "detectron2" / path.stem)
    return output_dir


def available(device: str) -> str:
    """The device, or the CPU where there is no such device."""
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
