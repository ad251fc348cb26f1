"""What a person asks for: a config, data, a profile and options. It prepares itself once."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from polyfocal.losses import Range


class Watcher(Protocol):
    """Is told how a training goes; what it raises ends the training."""

    def step(self) -> None:
        """After each iteration, of the training and of an evaluation."""

    def evaluated(self, epoch: int, measured: Mapping[str, float]) -> None:
        """After each evaluation: the epochs that are done, and the numbers by their names."""


@dataclass(frozen=True)
class Setting:
    """A setting of a loss: its value in the config, and where to search."""

    value: float
    range: Range


class Experiment(Protocol):
    """A training that is ready to run, as an adapter of a framework makes it."""

    notes: list[str]
    """What a person should know about how it came to be, a sentence each."""

    @property
    def quality(self) -> list[str]:
        """The numbers of an evaluation, by their short names, that say how good a model is.

        The first one is what a search maximises; higher is better, below 0 is none.
        """

    @property
    def per_cent(self) -> float:
        """What makes per cent of the numbers of ``quality``."""

    @property
    def epochs(self) -> int:
        """Epochs of the training; a UserError where it does not count in them."""

    def content(self) -> str:
        """What the config says, with its bases, before anything was adapted."""

    def settings(self) -> dict[str, Setting]:
        """What is worth a search in its loss, by name; a UserError where that is nothing."""

    def use_values(self, values: Mapping[str, float]) -> None:
        """Give the loss, in each head, other settings."""

    def use_epochs(self, epochs: int) -> None:
        """Shorten the training, its schedule with it; evaluate after every epoch, keep nothing."""

    def hold_out(self, folder: Path) -> None:
        """Train on four fifths of the training split, and evaluate on the others, not on val."""

    def measure(
        self, place: Path, *, seed: int, watchers: Sequence[Watcher] = (), resume: bool = False
    ) -> dict[str, float]:
        """Train and evaluate without a word on the console; the numbers by their short names.

        Args:
            place: Folder that gets ``console.log`` and the work directory ``run``.
            seed: Of weights and order.
            watchers: Are told how it goes.
            resume: Go on with an interrupted run of the same settings.
        """

    def write_variant(
        self, file: Path, values: Mapping[str, float], comment: Sequence[str]
    ) -> None:
        """Write a config that is this one with other settings of the loss.

        Args:
            file: To write.
            values: Of the settings.
            comment: Paragraphs to begin with.
        """


Adapter = Callable[["Request"], Any]
"""Makes an :class:`Experiment` of a request, as :func:`polyfocal.adapters.prepare` does."""


@dataclass(frozen=True)
class Request:
    """What is to be trained, on which data, and how.

    Attributes:
        adapter: Prepares it.
        config: A config of the adapter's framework.
        data: A folder to use in the place of the config's data set.
        tiny: Use the CPU-sized version of the architecture.
        demo: Use the built-in data and the CPU-sized version.
        options: Overrides such as ``{"train_cfg.max_epochs": 10}``, or a list in Detectron2's way.
            They win over everything else.
        train: Whether the train split is needed too, or only the val split.
    """

    adapter: Adapter = field(repr=False, compare=False)
    config: str | Path
    data: str | Path | None = None
    tiny: bool = False
    demo: bool = False
    options: Any = field(default_factory=dict)
    train: bool = True

    @cached_property
    def _prepared(self) -> Any:
        return self.adapter(self)

    def prepare(self) -> Any:
        """An experiment of its own to change and run; config and data are looked at once only.

        Raises:
            UserError: The config, an option or the data set is not usable.
        """
        return copy.deepcopy(self._prepared)
