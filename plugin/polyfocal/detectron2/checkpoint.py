"""Checkpoints: look at one before Detectron2 loads it, and say what is wrong with it."""

import codecs
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from polyfocal.errors import UserError


def check_checkpoint(file: str, model: nn.Module, *, strict: bool) -> None:
    """Refuse a file that is no checkpoint, that would run code, or that is of another model.

    Detectron2 unpickles a ``.pkl`` as it is, and only warns of weights that are not there.

    Args:
        file: A path, or an address that Detectron2 knows.
        model: The model that it is for.
        strict: Every weight of the model must be there with its shape; otherwise at least one.

    Raises:
        UserError: The file is missing, damaged or not to be trusted, or does not fit.
    """
    try:
        path = Path(PathManager.get_local_path(file))
    except Exception as error:  # of whatever the address leads to
        raise UserError(f"{file} cannot be fetched: {' '.join(str(error).split())}.") from error
    if not path.is_file():
        raise UserError(f"there is no checkpoint {file}.")
    try:
        content = _read(path)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{file} is not a checkpoint, or it is damaged.") from error
        raise UserError(
            f"{file} was refused: it asks for {refused[1]}, which weights do not need and which "
            f"could run code on this machine."
        ) from error
    except Exception as error:  # other bytes can fail the reader in any way
        raise UserError(f"{file} is not a checkpoint, or it is damaged.") from error
    if not isinstance(content, dict):
        content = {}
    weights = content.get("model", content.get("blobs", content))
    if not isinstance(weights, dict) or not any(hasattr(v, "shape") for v in weights.values()):
        raise UserError(f"{file} is not a checkpoint: it holds no weights.")
    if ("model" not in content and path.suffix == ".pkl") or content.get("matching_heuristics"):
        return  # of Caffe2 and others: Detectron2 translates its names
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {
        name.removeprefix("module."): tuple(weight.shape)
        for name, weight in weights.items()
        if hasattr(weight, "shape")
    }
    missing = sum(name not in found for name in wanted)
    reshaped = sum(name in found and found[name] != shape for name, shape in wanted.items())
    if missing + reshaped == 0 or (not strict and missing + reshaped < len(wanted)):
        return
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in found))
    raise UserError(
        f"{file} is the checkpoint of another model: of the {len(wanted)} weights of this "
        f"{type(model).__name__} it lacks {missing} and has {reshaped} in another shape; it "
        f"holds {parts}."
    )


def _read(path: Path) -> Any:
    if path.suffix == ".pkl":
        with open(path, "rb") as file:
            return _ArraysOnly(file, encoding="latin1").load()
    # A zip archive, torch's format since 1.6, can be looked at without reading all of it.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))


class _ArraysOnly(pickle.Unpickler):
    """Reads what the files of Detectron2's model zoo hold: NumPy arrays in dictionaries."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a name, where it is one of the few that arrays need."""
        # The names before and after NumPy 2 moved them: files of either age are around.
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _ARRAYS[module, name]


_ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): codecs.encode,  # how Python 3 writes bytes for Python 2
}
