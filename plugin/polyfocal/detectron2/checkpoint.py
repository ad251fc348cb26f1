"""Checkpoints: checks a checkpoint before Detectron2 loads it, and says what is wrong with it."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

from detectron2.checkpoint import detection_checkpoint
from detectron2.data import build
from detectron2.utils.file_io import PathManager
from torch import nn

from polyfocal.data import unpickling
from polyfocal.errors import UserError


@contextlib.contextmanager
def only_data() -> Iterator[None]:
    """Have Detectron2 read weights and proposals without running code, inside the block.

    It covers every ``torch.load`` of the process, and the pickles of the model zoo and of
    precomputed proposals.

    Raises:
        UserError: A file asks for a name that weights and arrays do not need.
    """

    def load(file: Any, encoding: str = "ASCII") -> Any:
        return unpickling.read_pickle(file, encoding)

    reader = SimpleNamespace(**{**vars(pickle), "load": load})
    with (
        unpickling.only_weights(),
        unpickling.replaced(detection_checkpoint, "pickle", reader),
        unpickling.replaced(build, "pickle", reader),
    ):
        yield


def check_checkpoint(file: str, model: nn.Module, *, strict: bool) -> None:
    """Refuse a file that is no checkpoint, that would run code, or that is of another model.

    Detectron2 only warns about missing weights.

    Args:
        file: A path, or an address that Detectron2 knows.
        model: The model that should get the weights.
        strict: Every weight of the model must be there with its shape; otherwise at least one.

    Raises:
        UserError: The file is missing, damaged or not to be trusted, or does not fit.
    """
    address = urlparse(file)  # the query says how names are matched
    try:
        path = Path(PathManager.get_local_path(address._replace(query="").geturl()))
    except Exception as error:  # of whatever the address leads to
        raise UserError(f"{file} cannot be fetched: {' '.join(str(error).split())}.") from error
    if path.suffix == ".pkl":
        content = unpickling.read_pickle(path)
    else:
        # A zip archive, torch's format since 1.6, can be checked without reading all of it.
        content = unpickling.read_weights(path, mmap=True)
    if not isinstance(content, dict):
        content = {}
    # Detectron2's own files, those of Detectron1, of pycls, and weights alone.
    named = next((key for key in ("model", "blobs", "model_state") if key in content), None)
    weights = content[named] if named else content
    if not isinstance(weights, dict) or not any(hasattr(v, "shape") for v in weights.values()):
        raise UserError(f"{file} is not a checkpoint: it holds no weights.")
    translated = content.get("matching_heuristics") or "matching_heuristics=True" in address.query
    if translated or named == "model_state" or (named != "model" and path.suffix == ".pkl"):
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
