"""Folders in which one process at a time works."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from polyfocal.errors import UserError


@contextlib.contextmanager
def own_folder(folder: Path, another: str) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made if it does not exist.

    The lock is the operating system's: it ends with the process, however the process ends. Workers
    of data loaders do not hold it. Of several processes that train together, the first holds it.

    Args:
        folder: Where the training writes.
        another: How a person names another folder, such as ``"--work-dir"``.

    Raises:
        UserError: The folder cannot be written or is in use.
    """
    ranks = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # torchrun, Slurm, MPI
    if any(os.environ.get(name, "0") != "0" for name in ranks):
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    with stream:
        try:
            import fcntl

            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            stream.seek(0)
            raise UserError(
                f"{folder} is in use by another training ({stream.read().strip()}): wait for it "
                f"or give another {another}."
            ) from error
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        with contextlib.suppress(OSError):  # a full disk has no room for the name
            os.ftruncate(stream.fileno(), 0)
            os.write(stream.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        yield
