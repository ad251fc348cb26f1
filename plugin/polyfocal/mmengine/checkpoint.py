"""Checkpoints: written whole, found again, and read without running code from the file."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from mmengine.fileio import PickleHandler
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from polyfocal._torch import allow_names
from polyfocal.data import unpickling
from polyfocal.errors import UserError

STARTED_FILE = "started.json"
"""The settings of the training in a work directory, written when it begins."""

_HISTORY_METHODS = ("min", "max", "current", "mean")


def allow_mmengine_checkpoints() -> None:
    """Let MMEngine's own checkpoints be read, also by ``torch.load(weights_only=True)``.

    Beside tensors these hold the histories of the losses (``HistoryBuffer``) and NumPy numbers and
    arrays. A ``HistoryBuffer`` also refers to four of its methods, through ``getattr``. A function
    that knows only these four stands for that name, because the real ``getattr`` would let a file
    run code.

    From torch 2.6 on MMEngine reads with torch's check, which is the default there. Exactly those
    names are then put on torch's allow-list.
    """
    histories = {
        f"{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}": HistoryBuffer,
        "builtins.getattr": _history_method,
    }
    unpickling.allow(histories)
    # The names before and after NumPy 2 moved them: there are checkpoints of either age.
    reconstruct, scalar = np.ndarray.__reduce__(np.empty(0))[0], np.float64(0).__reduce__()[0]
    names = {**histories, "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for package in ("numpy.core", "numpy._core"):
        names[f"{package}.multiarray._reconstruct"] = reconstruct
        names[f"{package}.multiarray.scalar"] = scalar
    for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?":
        kind = type(np.dtype(code))
        names[f"{kind.__module__}.{kind.__qualname__}"] = kind
    allow_names(names)


@contextlib.contextmanager
def only_data() -> Iterator[None]:
    """Have MMEngine read checkpoints and pickled data without running code, inside the block.

    It covers every ``torch.load`` of the process, whoever calls it: for the weights of a run, of a
    backbone (``init_cfg``) or of a teacher, from a file or an address. It also covers
    ``mmengine.load`` of pickles, such as MMDetection3D's info files.

    Raises:
        UserError: A file asks for a name that weights and arrays do not need.
    """

    def load(handler: PickleHandler, file: IO[bytes], **options: Any) -> Any:
        return unpickling.read_pickle(file, options.get("encoding", "ASCII"))

    with (
        unpickling.only_weights(),
        unpickling.replaced(PickleHandler, "load_from_fileobj", load),
    ):
        yield


def check_checkpoint(file: str | Path) -> None:
    """Refuse a file that is no checkpoint or that would run code, before anything is built.

    Raises:
        UserError: The file is missing, is no checkpoint, or asks for what weights do not need.
    """
    # A zip archive, torch's format since 1.6, can be checked without reading all of it.
    content = unpickling.read_weights(file, mmap=True)
    if not isinstance(content, dict) or not _state_dict(content):
        raise UserError(f"{file} is not a checkpoint: it holds no weights.")


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Replace a file by a complete one, or leave it as it is.

    Args:
        file: The file to replace.

    Yields:
        The name to write to, in the same folder. That file is removed if the writing fails.

    Raises:
        UserError: The file cannot be written.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())  # so that a power cut finds the content behind the name
        os.replace(part, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{file} cannot be written: {error.strerror}.") from error


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest checkpoint of a work directory, None if it holds none.

    It is the checkpoint that MMEngine's file ``last_checkpoint`` names, also if the directory has
    been moved since. That file is not written in one piece. If it is empty or missing, the newest
    checkpoint is the one that was written last, after the start of the training.
    """
    folder = Path(work_dir)
    with contextlib.suppress(OSError):
        named = (folder / "last_checkpoint").read_text(encoding="utf-8").strip()
        for file in (Path(named), folder / Path(named).name):
            if file.is_file():
                return file
    files = [*folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth")]
    started = folder / STARTED_FILE
    since = started.stat().st_mtime_ns if started.is_file() else 0
    written = [(file.stat().st_mtime_ns, file) for file in files]
    return max((one for one in written if one[0] >= since), default=(0, None))[1]


class CheckpointGuardHook(Hook):
    """Checks a loaded checkpoint against the model, where MMEngine would only warn.

    Args:
        file: The checkpoint, for the error's sentence.
        strict: Every weight of the model must be there with its shape; otherwise at least one.
    """

    def __init__(self, file: str | Path, *, strict: bool) -> None:
        self.file = file
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the weights with the model's.

        Raises:
            UserError: It is the checkpoint of another model.
        """
        # On resume MMEngine runs this text as a Python file, only to look for old gpu_ids in it.
        checkpoint.get("meta", {}).pop("config", None)
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        check_weights(model, checkpoint, self.file, strict=self.strict)


def check_weights(
    model: torch.nn.Module, checkpoint: dict[str, Any], file: str | Path, *, strict: bool
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that was read, by the names of a model without wrappers.

    Args:
        model: The model that they are for.
        checkpoint: What the file holds.
        file: The file, for the error's sentence.
        strict: Every weight of the model must be there with its shape; otherwise at least one.

    Raises:
        UserError: It is the checkpoint of another model.
    """
    weights = {
        name.removeprefix("module."): value for name, value in _state_dict(checkpoint).items()
    }
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    missing = sum(name not in weights for name in wanted)
    reshaped = sum(
        name in weights and weights[name].shape != shape for name, shape in wanted.items()
    )
    wrong = missing + reshaped
    if wrong == 0 or (not strict and wrong < len(wanted)):
        return weights
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in weights))
    classes = classes_of(checkpoint)
    about = f" and was trained for {len(classes)} classes" if classes else ""
    raise UserError(
        f"{file} is the checkpoint of another model: of the {len(wanted)} weights of this "
        f"{type(model).__name__} it lacks {missing} and has {reshaped} in another shape; it "
        f"holds {parts}{about}."
    )


def classes_of(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a training left in its checkpoint; none if it left none."""
    return tuple(checkpoint.get("meta", {}).get("dataset_meta", {}).get("classes", ()))


def _state_dict(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = checkpoint.get("state_dict", checkpoint)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _history_method(owner: Any, name: str) -> Callable[..., Any]:
    if owner is HistoryBuffer and name in _HISTORY_METHODS:
        return getattr(HistoryBuffer, name)
    raise unpickling.Refused("builtins.getattr")
