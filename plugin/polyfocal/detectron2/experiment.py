"""What the tool needs of a config, whichever of Detectron2's two kinds it is."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from polyfocal.errors import UserError
from polyfocal.losses import Loss

TINY_BATCH = 4
KEYPOINTS = "the keypoints of objects"
PIXELS = "the class of every pixel"

_COCO_TRAIN = 117_266  # pictures with objects in COCO 2017's train split
_TINY_EPOCHS = 8
_EVALUATIONS = 3
_CHECKPOINTS = 12


Evaluations = dict[str, tuple[Iterable[Any], list[DatasetEvaluator]]]
"""By the name of a data set: its loader, and the evaluator of the detections."""


@dataclass
class Data:
    """A data set that replaces that of the config.

    Attributes:
        train: Name of the train split in Detectron2's catalogs; empty if it is not needed.
        val: Name of the val split.
        num_train: Pictures with objects in the train split.
        num_classes: Number of classes.
        max_dets: Most detections per picture that are kept and counted.
        counts: Objects of the train split by class.
    """

    train: str
    val: str
    num_train: int
    num_classes: int
    max_dets: int
    counts: Counter[str] = field(default_factory=Counter)


class PlacedLoss(NamedTuple):
    """A loss in a config.

    Attributes:
        place: Key of the loss.
        settings: Settings of the loss, to be changed in place.
        kind: Class of the loss.
        head: What takes it: 'dense', 'box', or another part, whose loss tells no classes apart.
    """

    place: str
    settings: Any
    kind: type[Loss]
    head: str


@dataclass(frozen=True)
class Recipe:
    """The numbers of a schedule that belong together.

    Attributes:
        steps: Number of training steps.
        batch: Pictures per step, of all processes.
        rate: Learning rate after the warm-up.

    Raises:
        UserError: A number is none or out of its range.
    """

    steps: int
    batch: int
    rate: float

    def __post_init__(self) -> None:
        _check_whole("max_iter", self.steps, 1)
        _check_whole("the batch", self.batch, 1)
        if not isinstance(self.rate, int | float):
            raise UserError(f"the config has {self.rate!r} as learning rate: expected a number")


@dataclass
class Settings:
    """What else a run needs to know, beside the parts that it builds.

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
        seed: Seed of everything random; negative for a new seed in each run.
        ddp: Keywords of DistributedDataParallel.
        cudnn_benchmark: Whether cuDNN tries its algorithms first.
        float32_precision: As ``torch.set_float32_matmul_precision`` takes it, or empty.

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
    cudnn_benchmark: bool = False
    float32_precision: str = ""

    def __post_init__(self) -> None:
        least = {"max_iter": 1, "eval_period": 0, "checkpoint_period": 1, "log_period": 1}
        for name, low in least.items():
            _check_whole(name, getattr(self, name), low)


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"the config has {value!r} as {name}: expected a whole number >= {least}")


class Experiment(ABC):
    """A config of Detectron2: it can be adapted, and then its parts can be built.

    Args:
        path: The config file, for the sentences of errors.

    Attributes:
        notes: What a person should know about how it was adapted.
        STEPS, BATCH, RATE: The keys of what is in a :class:`Recipe`.
        OUTPUT: The key of the output directory.
    """

    STEPS: ClassVar[str]
    BATCH: ClassVar[str]
    RATE: ClassVar[str]
    OUTPUT: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether the model predicts masks."""

    @property
    @abstractmethod
    def needs_more(self) -> str:
        """What the model is trained on beside boxes and masks of objects; empty for nothing."""

    @abstractmethod
    def use_tiny_profile(self, side: int) -> None:
        """Take the CPU-sized version of the model and its recipe; pictures of at most ``side``."""

    @abstractmethod
    def use_small_profile(self, side: int) -> None:
        """Take the CPU-sized version of the model on a pretrained backbone, and its recipe.

        Raises:
            UserError: The weights are not installed, or there is no place for the backbone.
        """

    @abstractmethod
    def use_data(self, data: Data) -> None:
        """Train and evaluate on ``data``."""

    @abstractmethod
    def no_flip(self) -> None:
        """Mirror no picture."""

    def finish(self, options: Sequence[str], data: Data | None = None, *, tiny: bool) -> None:
        """Apply the overrides of the command line, and let the schedule follow data and overrides.

        Args:
            options: The overrides.
            data: What is trained on instead of the config's data, for as many passes as before,
                or 8 if tiny.
            tiny: Whether the recipe is that of a profile.

        Raises:
            UserError: An override does not fit the config.
        """
        planned = self.recipe()
        given = self.override(options)
        recipe = self.recipe()
        if self.BATCH in given and self.RATE not in given and not tiny:
            rate = planned.rate * recipe.batch / planned.batch
            self.notes.append(
                f"the learning rate {planned.rate:g} was chosen for {planned.batch} pictures in a"
                f" step, and {self.BATCH} is {recipe.batch}; {self.RATE} {rate:g} would be in"
                " proportion."
            )
        if data is None or not data.num_train:
            return
        steps = recipe.steps
        if self.STEPS not in given:
            epochs = _TINY_EPOCHS if tiny else planned.steps * planned.batch / _COCO_TRAIN
            steps = max(1, round(epochs * data.num_train / recipe.batch))
        self.use_steps(steps, planned.steps, given)
        passes = steps * recipe.batch / data.num_train
        shown = f"{passes:.0f}" if passes >= 10 else f"{passes:.2g}"
        change = "" if self.STEPS in given else f"; {self.STEPS} changes that"
        self.notes.append(
            f"{steps} steps are {shown} passes over {data.num_train} pictures with objects{change}."
        )

    @abstractmethod
    def override(self, options: Sequence[str]) -> set[str]:
        """Apply overrides and return their keys."""

    @abstractmethod
    def recipe(self) -> Recipe:
        """How many steps of how many pictures, and at which learning rate."""

    @abstractmethod
    def use_steps(self, steps: int, planned: int, given: set[str]) -> None:
        """Train for so many steps; what depends on the planned steps follows, unless given."""

    @abstractmethod
    def losses(self) -> Iterable["PlacedLoss"]:
        """The losses of the model, whose settings may be changed."""

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
    def build_evaluations(self) -> Evaluations:
        """Build the loaders of the evaluation and what counts the detections."""


def periods(max_iter: int) -> tuple[int, int]:
    """Steps between evaluations and between checkpoints of a short training."""
    return -(-max_iter // _EVALUATIONS), -(-max_iter // _CHECKPOINTS)


def default_output_dir(output_dir: str, path: Path) -> str:
    """Detectron2's default is one folder for all configs; here each has its own."""
    if Path(output_dir) != Path("output"):
        return output_dir
    kind = "" if path.suffix == ".py" else f"_{path.suffix.removeprefix('.')}"
    return str(Path("work_dirs") / "detectron2" / f"{path.stem}{kind}")


def available(device: str) -> str:
    """The device, or the CPU if there is no such device."""
    return "cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device
