"""Generated data sets: settings that are checked, folders written whole or not at all."""

import json
import shlex
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from polyfocal.data.files import folder_written_whole, is_new
from polyfocal.errors import UserError


@dataclass(frozen=True)
class Scenes(ABC):
    """The settings of a generated data set.

    Attributes:
        what: What is in it, such as ``"digit scenes"``, for the sentences of errors.
        settings_file: Name of the JSON file, in its folder, that tells what is in it.
        command: Name of the command that writes it; empty if there is none.
        version: Version of the generator: raised whenever the same settings would give other files.
        seed: Seed of everything random, ``>= 0``.
    """

    what: ClassVar[str]
    settings_file: ClassVar[str]
    command: ClassVar[str] = ""
    version: ClassVar[int]

    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("num_train", 1), ("num_val", 1), ("num_ood", 1)):
            count = getattr(self, name, 1)
            self.check(name, whole(count) and count >= least, f"a whole number of {least} or more")

    def check(self, name: str, ok: bool, right: str) -> None:
        """Refuse the value of a setting.

        Raises:
            UserError: It is not ok.
        """
        if not ok:
            raise UserError(f"{name} of {self.what} must be {right}, got {getattr(self, name)!r}.")

    @property
    @abstractmethod
    def splits(self) -> dict[str, int]:
        """Name and number of pictures or frames of each split that is written."""

    @abstractmethod
    def fill(self, folder: Path) -> None:
        """Write the data into a folder, which exists."""

    def write(self, root: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder, which appears complete or not at all, unless it holds the same already.

        Args:
            root: The folder to make; its parents are made as needed.
            overwrite: Replace a folder of the same kind, whatever its settings and its state. Any
                other folder is never replaced.

        Returns:
            ``root``.

        Raises:
            UserError: ``root`` holds something else or cannot be written.
        """
        root = Path(root)
        file = self.settings_file
        wanted = {"version": self.version, "settings": json.loads(json.dumps(asdict(self)))}
        found = _settings_in(root / file)
        if found == wanted and not overwrite:
            return root
        if found is not None and not overwrite:
            how = "overwrite it"
            if self.command:
                words = f"{self.command} {shlex.quote(str(root))} --overwrite"
                how = f"replace it with `polyfocal {words}` and your options"
            raise UserError(
                f"{root} holds {self.what} of other settings ({_difference(found, wanted)}): "
                f"remove it, give another folder, or {how}."
            )
        if found is None and not is_new(root):
            raise UserError(f"{root} exists and holds no {self.what}; give a new or empty folder.")
        try:
            with folder_written_whole(root, replace=found is not None) as new:
                self.fill(new)
                (new / file).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            # Another process may have finished the same set first.
            if _settings_in(root / file) != wanted:
                raise UserError(f"Cannot write {self.what} to {root}: {error.strerror}.") from error
        return root


def whole(value: Any) -> bool:
    """Whether a setting is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_pair(value: Any) -> bool:
    """Whether a setting is two whole numbers."""
    return isinstance(value, tuple) and len(value) == 2 and all(map(whole, value))


def _settings_in(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return {}  # ours by its name, but not readable: never equal to any settings
    return content if isinstance(content, dict) else {}


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    if found.get("version") != wanted["version"]:
        return f"version {found.get('version')} there, {wanted['version']} wanted"
    there = found.get("settings") or {}
    return ", ".join(
        f"{name} {there.get(name)} there, {value} wanted"
        for name, value in wanted["settings"].items()
        if there.get(name) != value
    )
