"""Features of pictures, computed once and kept on disk.

A file holds the features of one picture as a frozen backbone sees it, in float16, with a checksum.
A file is complete or does not exist, and what is missing or damaged is computed anew: a run that is
killed leaves nothing wrong, and runs beside each other share what each has computed.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from polyfocal.data.files import written_whole
from polyfocal.errors import UserError

_LARGEST = float(np.finfo(np.float16).max)
_CHECKSUM = 4  # bytes, at the end


class FeatureStore:
    """A folder of features.

    Args:
        folder: Made as needed.
        limit: Bytes that its files may take. Files unused for longest are deleted to make room.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._checked: set[str] = set()

    def has(self, key: str, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether there are whole features under a key."""
        return self._read(key, _count(shapes)) is not None

    def get(
        self, key: str, shapes: Sequence[Sequence[int]], compute: Callable[[], Sequence[Tensor]]
    ) -> list[Tensor]:
        """The features under a key, read from the disk or computed and written.

        Args:
            key: Hash of all that the features depend on, as :func:`hashlib.sha256` writes it.
            shapes: Shapes of the features, one per stage.
            compute: Computes the features if there are none yet.

        Returns:
            Tensors in float16 on the CPU, to be read only.

        Raises:
            UserError: They cannot be written.
        """
        flat = self._read(key, _count(shapes))
        if flat is None:
            whole = torch.cat([one.detach().float().cpu().flatten() for one in compute()])
            flat = whole.clamp(-_LARGEST, _LARGEST).half().numpy()
            self._write(key, flat)
        sizes = [_count([shape]) for shape in shapes]
        with_shape = zip(torch.from_numpy(flat).split(sizes), shapes, strict=True)
        return [part.view(*shape) for part, shape in with_shape]

    def make_room(self, keys: Iterable[str], needed: int) -> None:
        """Make the files that a training needs fit below the limit, by deleting others.

        Args:
            keys: Keys of the files that the training needs.
            needed: Bytes that these files take together.

        Raises:
            UserError: They do not fit.
        """
        if needed > self.limit:
            raise UserError(
                f"the features of the pictures take {needed / 2**30:.1f} GiB in {self.folder}, of"
                f" which at most {self.limit / 2**30:.1f} are kept: train without --freeze, or"
                " give FrozenFeaturesHook a higher limit_gb in custom_hooks."
            )
        wanted = {self._file(key) for key in keys}
        others = []
        for file in self.folder.glob("*/*"):
            if file not in wanted:
                with contextlib.suppress(FileNotFoundError):  # another run has removed it
                    stat = file.stat()
                    others.append((stat.st_mtime, stat.st_size, file))
        room = self.limit - needed - sum(size for _, size, _ in others)
        for _, size, file in sorted(others):
            if room >= 0:
                return
            file.unlink(missing_ok=True)
            room += size

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.f16"

    def _read(self, key: str, count: int) -> np.ndarray | None:
        file = self._file(key)
        try:
            if file.stat().st_size != 2 * count + _CHECKSUM:
                return None
            # Private: torch does not take arrays that cannot be written.
            flat = np.memmap(file, np.float16, mode="c", shape=count)
            if key not in self._checked:
                with file.open("rb") as stream:
                    stream.seek(2 * count)
                    if stream.read() != _checksum(flat):
                        return None
                os.utime(file)  # was used now
                self._checked.add(key)
        except (OSError, ValueError):
            return None
        return flat

    def _write(self, key: str, flat: np.ndarray) -> None:
        with written_whole(self._file(key)) as part:
            part.write_bytes(flat.tobytes() + _checksum(flat))


def _count(shapes: Sequence[Sequence[int]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def _checksum(flat: np.ndarray) -> bytes:
    return zlib.crc32(np.ascontiguousarray(flat).view(np.uint8).data).to_bytes(_CHECKSUM, "little")
