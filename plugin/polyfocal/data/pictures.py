"""Pictures as a training will see them: the code that will load a picture also checks it.

Most pictures are plain: a JPEG or PNG of 8 bits without a rotation, which every loader reads in the
size of its header. For other pictures loaders differ: in the formats that they read, in how they
treat the EXIF orientation, and in what they make of more than 8 bits. So those are loaded once.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Loader = Callable[[Path], NDArray[np.uint8]]
"""Reads a picture as (H, W, 3), BGR; raises an exception if it cannot."""

_EXIF_ORIENTATION = 0x0112
_TURNS = {  # what Pillow does for each orientation that is not upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN_MODES = {
    "JPEG": ("L", "RGB"),
    "MPO": ("L", "RGB"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
}
_END_OF_FILE = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096  # bytes; some cameras and editors write some more after the end of the picture
_PNG_SIGNATURE = 8  # bytes
_PNG_DEPTH = 24  # where the first chunk says how many bits a sample has
_NEARLY_BLACK = 16  # of 255: the brightest 12-bit value if only the upper 8 of 16 bits are kept


class PictureError(Exception):
    """A picture cannot be loaded, with the reason."""


def load_with_opencv(path: Path) -> NDArray[np.uint8]:
    """What MMDetection's ``LoadImageFromFile`` makes of a picture by default: OpenCV's decoder.

    Raises:
        PictureError: OpenCV does not read it.
    """
    import cv2

    try:
        found = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise PictureError(f"OpenCV refuses it: {error.err or error}") from None
    if found is None:
        raise PictureError("OpenCV does not read it")
    return found


def load_with_pillow(path: Path) -> NDArray[np.uint8]:
    """What Detectron2's ``read_image`` makes of a picture: Pillow's decoder, turned by its EXIF."""
    with Image.open(path) as picture:
        turned = _TURNS.get(_orientation(picture) or 1)
        upright = picture if turned is None else picture.transpose(turned)
        return np.asarray(upright.convert("RGB"))[:, :, ::-1]


def usual_loader() -> Loader:
    """The loader with OpenCV if it is installed, otherwise with Pillow."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        return load_with_pillow
    return load_with_opencv


@dataclass(frozen=True)
class Finding:
    """What was found about a picture; both texts are empty for most pictures.

    Attributes:
        problem: Why the picture cannot be used, the beginning of a sentence.
        remark: What else to know.
        size: Width and height as it is loaded; (0, 0) if it cannot be loaded.
    """

    problem: str = ""
    remark: str = ""
    size: tuple[int, int] = (0, 0)


def check_pictures(
    paths: Sequence[Path], sizes: Sequence[tuple[int, int] | None], load: Loader
) -> list[Finding]:
    """Check pictures as far as is needed to know what a loader makes of them.

    Of every picture the header and the end are read. Pictures that are not plain are loaded.

    Args:
        paths: The files.
        sizes: Width and height that each is said to have; None if nothing says so.
        load: What the training loads pictures with.
    """
    with _quiet(), ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(lambda path, size: _look(path, size, load), paths, sizes))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings of large pictures, and OpenCV's of pictures it cannot read."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        with suppress(ImportError):
            import cv2

            log = getattr(cv2.utils, "logging", cv2)  # where OpenCV 5 and 4 have it
            silent = 0
            stack.callback(log.setLogLevel, log.setLogLevel(silent))
        yield


def _look(path: Path, said: tuple[int, int] | None, load: Loader) -> Finding:
    kind, orientation = "", None
    try:
        with open(path, "rb") as stream, Image.open(stream) as picture:
            kind = f"a {picture.format} file of mode {picture.mode}"
            end = _END_OF_FILE.get(picture.format or "")
            if end is not None and not _ends_with(stream, end):
                picture.load()  # says what is missing, or that nothing is
            if _is_plain(stream, picture):
                return _compared(path, picture.size, said)
            orientation = _orientation(picture)
    except FileNotFoundError:
        return Finding(f"picture {path} is missing{_why_missing(path)}")
    except Image.DecompressionBombError:
        pass  # too many pixels for Pillow; the loader may take them
    except Image.UnidentifiedImageError:
        if not path.stat().st_size:
            return Finding(f"picture {path} cannot be read: it is empty")
    except (OSError, SyntaxError, ValueError) as error:
        reason = "it is a folder" if os.path.isdir(path) else _reason(error)
        return Finding(f"picture {path} cannot be read: {reason}")
    try:
        loaded = load(path)
    except Image.DecompressionBombError as error:
        return Finding(f"picture {path} cannot be read: {_reason(error)}; make it smaller")
    except Exception as error:  # a loader may fail in any way
        reason = "it is not a picture of a known format"
        if kind:
            reason = f"{_reason(error)} ({kind}), convert it to PNG or JPEG of 8 bits"
        return Finding(f"picture {path} cannot be read: {reason}")
    if loaded.ndim != 3:
        return Finding(
            f"picture {path} is loaded as an array of shape {loaded.shape}, not (height, width, "
            f"channels) ({kind}): convert it to PNG or JPEG of 8 bits"
        )
    height, width = loaded.shape[:2]
    found = _compared(path, (width, height), said, orientation)
    if not found.problem and loaded.dtype == np.uint8 and 0 < loaded.max() < _NEARLY_BLACK:
        return Finding(
            remark=f"picture {path} is nearly black as it is loaded ({kind}): its brightest value "
            f"is {loaded.max()} of 255",
            size=found.size,
        )
    return found


def _compared(
    path: Path,
    size: tuple[int, int],
    said: tuple[int, int] | None,
    orientation: int | None = None,
) -> Finding:
    if said is None or size == said:
        return Finding(size=size)
    how = f" as it is loaded, with its EXIF orientation {orientation}" if orientation else ""
    return Finding(
        f"picture {path} has {size[0]}x{size[1]} pixels{how}, but its entry says "
        f"{said[0]}x{said[1]}"
    )


def _is_plain(stream: Any, picture: Any) -> bool:
    """Whether every loader reads the picture as its header says."""
    if picture.mode not in _PLAIN_MODES.get(picture.format, ()):
        return False
    if picture.format == "PNG":
        return getattr(picture, "n_frames", 1) == 1 and _is_plain_png(stream)
    return _orientation(picture) in (None, 1)


def _is_plain_png(stream: Any) -> bool:
    """Whether a PNG has at most 8 bits per sample and no orientation."""
    position = stream.tell()
    try:
        stream.seek(_PNG_DEPTH)
        if stream.read(1) > b"\x08":
            return False
        stream.seek(_PNG_SIGNATURE)
        while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return False
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                begin = stream.read(min(length, 16))
                if begin.startswith((b"Raw profile", b"XML:com.adobe")):
                    return False
                length -= len(begin)
            stream.seek(length + 4, os.SEEK_CUR)  # and the checksum
        return True
    finally:
        stream.seek(position)


def _orientation(picture: Any) -> int | None:
    try:
        found = picture.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # what cannot be read turns nothing
        return None
    return found if isinstance(found, int) else None


def _ends_with(stream: Any, end: bytes) -> bool:
    position = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(size - _TAIL, 0))
    found = end in stream.read(_TAIL)
    stream.seek(position)
    return found


def _why_missing(path: Path) -> str:
    if "\\" in str(path):
        return ": its file_name has backslashes, write / in their place"
    return ""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
