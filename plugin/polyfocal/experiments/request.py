"""A request: a config, data, a profile and options. It is prepared once."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from polyfocal.data.coco import annotations_digest
from polyfocal.losses import Range

_RECIPES = {"small": 3}  # 2: a learning rate of 3e-3, not 1e-3; 3: two frozen stages, not one


def recipe(profile: str | None) -> dict[str, int]:
    """How often the recipe of a profile has changed, for what results depend on; empty: never.

    Raise the number whenever a profile trains otherwise than before: results from before the change
    then are not mixed with those after it.
    """
    return {"recipe": _RECIPES[profile]} if profile in _RECIPES else {}


class Watcher(Protocol):
    """Follows a training; an exception of a watcher ends the training."""

    def step(self) -> None:
        """After each iteration, of the training and of an evaluation."""

    def evaluated(self, epoch: int, measured: Mapping[str, float]) -> None:
        """After each evaluation: the epochs that are done, and the numbers by their names."""


@dataclass(frozen=True)
class Setting:
    """A setting of a loss: its value in the config, its range, and the options that set it."""

    value: float
    range: Range
    options: tuple[str, ...] = ()


class Experiment(Protocol):
    """A training that is ready to run, as an adapter of a framework makes it."""

    notes: list[str]
    """What a person should know about how it was prepared, a sentence each."""

    @property
    def quality(self) -> list[str]:
        """The numbers of an evaluation, by their short names, that say how good a model is.

        A search maximises the first. Higher is better; a value below 0 means that there is none.
        """

    @property
    def per_cent(self) -> float:
        """The factor from the numbers of ``quality`` to per cent."""

    @property
    def epochs(self) -> int:
        """Epochs of the training; a UserError if the training does not count in epochs."""

    def content(self) -> str:
        """A hash of what the config says, with its bases, before anything was adapted."""

    def settings(self) -> dict[str, Setting]:
        """The settings of its loss that are worth a search, by name; a UserError if none is."""

    def use_values(self, values: Mapping[str, float]) -> None:
        """Give the loss, in each head, other settings."""

    def use_epochs(self, epochs: int) -> None:
        """Shorten the training and its schedule; evaluate after every epoch, keep no checkpoint."""

    def hold_out(self, folder: Path) -> None:
        """Train on four fifths of the training split; evaluate on the other fifth, not on val."""

    def measure(
        self, place: Path, *, seed: int, watchers: Sequence[Watcher] = (), resume: bool = False
    ) -> dict[str, float]:
        """Train and evaluate without console output; the numbers by their short names.

        Args:
            place: Folder that gets ``console.log`` and the work directory ``run``.
            seed: Seed of weights and order.
            watchers: Follow the training.
            resume: Continue an interrupted run of the same settings.
        """

    def write_variant(
        self, file: Path, values: Mapping[str, float], comment: Sequence[str]
    ) -> None:
        """Write a config that is this one with other settings of the loss.

        Args:
            file: The file to write.
            values: Values of the settings, by name.
            comment: Paragraphs for the top of the file.
        """


Adapter = Callable[["Request"], Any]
"""Makes an :class:`Experiment` of a request, as :func:`polyfocal.adapters.prepare` does."""


@dataclass(frozen=True)
class Request:
    """What is to be trained, on which data, and how.

    Attributes:
        adapter: Prepares it.
        config: A config of the adapter's framework.
        data: A folder to use instead of the config's data set.
        profile: "tiny" or "small", the CPU-sized versions of the architecture, the second one on a
            pretrained backbone; None for the config's own size.
        demo: Use the built-in data and the CPU-sized version.
        options: Overrides such as ``{"train_cfg.max_epochs": 10}``, or a list in Detectron2's way.
            They win over everything else.
        train: Whether the train split is needed too, or only the val split.
        freeze: With the profile small, keep the backbone as it is, and train on its features.
    """

    adapter: Adapter = field(repr=False, compare=False)
    config: str | Path
    data: str | Path | None = None
    profile: str | None = None
    demo: bool = False
    options: Any = field(default_factory=dict)
    train: bool = True
    freeze: bool = False

    @cached_property
    def annotations(self) -> str | None:
        """A hash of the annotations of a COCO-format folder of data; None for anything else."""
        return annotations_digest(self.data) if self.data else None

    @cached_property
    def _prepared(self) -> Any:
        return self.adapter(self)

    def prepare(self) -> Any:
        """A new copy of the experiment, to change and run; config and data are read only once.

        Raises:
            UserError: The config, an option or the data set is not usable.
        """
        return copy.deepcopy(self._prepared)
