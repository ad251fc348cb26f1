"""Reads checkpoints and other pickles without running code from the file, on any torch.

A pickle names functions and classes, which the reader looks up and calls. The reader here knows the
few names that weights and arrays need. For some of them it has its own functions, which accept
less. It refuses a file that asks for anything else. ``torch.load`` gets this reader as its
unpickler instead of its ``weights_only`` check, because of what that check lacks:

- before torch 2.6 a file can get past it (CVE-2025-32434), before 2.10 a file can corrupt memory
  (CVE-2026-24747);
- before torch 2.4 no names can be added to it, and before 2.6 only the objects' own names;
- with NumPy's names added, as MMEngine's checkpoints need them, a file may give a dtype fields
  that lie outside of its array, in every version of both.
"""

import contextlib
import os
import pickle
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from polyfocal._torch import REBUILD_FUNCTIONS
from polyfocal.errors import UserError

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def allow(names: Mapping[str, Any]) -> None:
    """Let checkpoints ask for more names.

    Args:
        names: What ``module.name`` in a file stands for. The arguments of a call, and the state
            that an instance gets, come from the file.
    """
    _TENSORS.update(names)


def read_weights(
    file: str | Path | IO[bytes], map_location: Any = "cpu", *, mmap: bool = False
) -> Any:
    """Read a file that ``torch.save`` wrote.

    Args:
        file: The file, or an open stream of it.
        map_location: As in ``torch.load``.
        mmap: For a zip archive, leave the numbers on the disk until they are used.

    Raises:
        UserError: The file is missing, is damaged, or asks for what weights do not need.
    """
    with _open(file, "checkpoint", "weights") as stream:
        return _load(stream, map_location, str(file) if mmap else None)


def read_pickle(file: str | Path | IO[bytes], encoding: str = "latin1") -> Any:
    """Read a pickle of dictionaries, lists, numbers, text and NumPy arrays.

    Args:
        file: The file, or an open stream of it.
        encoding: Encoding of text that Python 2 wrote.

    Raises:
        UserError: The file is missing, is damaged, or asks for what arrays do not need.
    """
    with _open(file, "file", "arrays") as stream:
        return _Unpickler(stream, encoding=encoding).load()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace a name of a module or class inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def only_weights() -> contextlib.AbstractContextManager[None]:
    """Make every ``torch.load`` of the process read as :func:`read_weights` does, in the block.

    Frameworks call ``torch.load`` in many places: for weights of a run, of a backbone, from an
    address.
    """

    def load(f: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
        return read_weights(f, map_location)

    return replaced(torch, "load", load)


class Refused(pickle.UnpicklingError):
    """A file asks for a name that it does not need; the text says which."""


@contextlib.contextmanager
def _open(file: Any, kind: str, content: str) -> Iterator[IO[bytes]]:
    """The open stream of a file; what goes wrong in the block becomes one sentence."""
    is_path = isinstance(file, str | os.PathLike)
    name = file if is_path else getattr(file, "name", f"a {kind} of {content}")
    if is_path and not Path(file).is_file():
        raise UserError(f"there is no {kind} {name}.")
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(open(file, "rb")) if is_path else file
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of other kinds of file: they end below anyway
            yield stream
    except UserError:
        raise
    except Refused as error:
        raise UserError(
            f"{name} was refused: it asks for {error}, which {content} do not need and which "
            "could run code on this machine."
        ) from error
    except Exception as error:  # other bytes can fail the reader in any way
        a_kind = "checkpoint" if kind == "checkpoint" else f"{kind} of {content}"
        raise UserError(f"{name} is not a {a_kind}, or it is damaged.") from error


class _Unpickler(pickle._Unpickler):
    """Python's unpickler; it looks names up in a table and writes only to new objects."""

    names: Mapping[str, Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the table stands for."""
        module = module.replace("__builtin__", "builtins")  # as Python 2 had it
        try:
            return self.names[f"{module}.{name}"]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def load_build(self) -> None:
        """Give an object its state: an instance of a class of the table, never the class."""
        target, state = self.stack[-2:]  # type: ignore[attr-defined]
        if type(target) is np.ndarray:
            _check_array(*state)
        elif isinstance(target, np.dtype):
            # Everything except the byte order was given when the dtype was made.
            if state[2:] != target.__reduce__()[2][2:]:
                raise Refused(f"the state {state} of a {target}")
        elif not any(type(target) is known for known in self.names.values()):
            raise Refused(f"a state of {target!r}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _check_array(version: int, shape: Any, dtype: Any, fortran: Any, data: Any) -> None:
    _plain(dtype)
    count = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise Refused(f"an array of shape {shape}")
        count *= length
    if not isinstance(data, bytes | str) or len(data) != count * dtype.itemsize:
        raise Refused(f"an array of shape {shape} and other data")


def _plain(dtype: Any) -> Any:
    """The dtype, if it is of numbers or text; other dtypes refer to places in memory."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufcSU":
        raise Refused(f"an array of {dtype}")
    return dtype


def _dtype(code: str, align: bool = False, copy: bool = False) -> Any:
    return _plain(np.dtype(str(code), align, True))


def _new_array(kind: Any, shape: Any, dtype: Any) -> NDArray[Any]:
    """The array before its state, which brings shape, dtype and content."""
    return np.ndarray((0,), np.int8)


def _scalar(dtype: Any, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data  # of Python 2
    return np.frombuffer(raw, _plain(dtype), count=1)[0]


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: str) -> NDArray[Any]:
    return np.frombuffer(buffer, _plain(dtype)).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise Refused(f"text in {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 writes empty bytes for Python 2."""
    return b""


# NumPy's names before and after NumPy 2 moved them: there are files of either age.
_ARRAYS: dict[str, Any] = {
    "builtins.bytes": _no_bytes,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "numpy.ndarray": "ndarray",  # told to _reconstruct, which makes nothing else
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.{name}": value
        for core in ("core", "_core")
        for name, value in {
            "multiarray._reconstruct": _new_array,
            "multiarray.scalar": _scalar,
            "numeric._frombuffer": _from_buffer,
        }.items()
    },
}
_Unpickler.names = _ARRAYS


_TENSORS: dict[str, Any] = {
    **_ARRAYS,
    "collections.Counter": Counter,  # milestones of a schedule
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **REBUILD_FUNCTIONS,
}


class _WeightsUnpickler(_Unpickler):
    """What ``torch.load`` makes an unpickler of; it sets ``persistent_load``."""

    names = _TENSORS
    sizes: Mapping[str, int] | None = None
    """Bytes of the archive's records by name; None if the file is no archive."""

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        return self._storage

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        self._load_storage = load

    def _storage(self, asked: Any) -> Any:
        """The numbers of a tensor; torch before 2.10 trusts the file about how many there are."""
        if not isinstance(asked, tuple) or asked[0] not in ("storage", b"storage"):
            raise Refused(f"the object {str(asked)[:60]}")
        if self.sizes is None:
            if asked[-1] is not None:  # torch 0.3's: memory in use by two, which one may give back
                raise Refused("a part of another tensor's memory")
        else:
            _, kind, key, _, length = asked
            width = 1 if kind is torch.UntypedStorage else kind.dtype.itemsize
            if (
                type(length) is not int
                or not 0 <= length * width <= self.sizes[f"data/{key}".lower()]
            ):
                raise pickle.UnpicklingError(f"{length} numbers are more than the file has")
        return self._load_storage(asked)


def _load(stream: IO[bytes], map_location: Any, path: str | None = None) -> Any:
    if os.environ.get(_FORCED, "0").lower() in ("1", "y", "yes", "true"):
        raise UserError(
            f"the environment variable {_FORCED} is set, and torch then takes no other check than "
            "its own: unset it. What is read here runs no code in any case."
        )
    start = stream.tell()
    is_archive = stream.read(4) == b"PK\x03\x04"  # as torch asks
    stream.seek(start)
    sizes: dict[str, int] | None = None
    if is_archive:
        sizes = {}
        with zipfile.ZipFile(stream) as archive:
            for record in archive.infolist():
                name = record.filename.partition("/")[2].lower()  # torch asks in either case
                sizes[name] = min(record.file_size, sizes.get(name, record.file_size))
        if "constants.pkl" in sizes:
            raise Refused("TorchScript")
    elif tarfile.is_tarfile(stream):
        raise Refused("tar, the format before torch 0.1.10")
    stream.seek(start)
    module = ModuleType(__name__)
    module.Unpickler = type("Unpickler", (_WeightsUnpickler,), {"sizes": sizes})  # type: ignore
    module.load = lambda file, **options: module.Unpickler(file, **options).load()  # type: ignore
    if path is not None and is_archive:
        return torch.serialization.load(path, map_location, pickle_module=module, mmap=True)
    return torch.serialization.load(stream, map_location, pickle_module=module)
