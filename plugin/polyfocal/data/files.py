"""Files of a data set: reads text and JSON with a sentence per way to fail; writes whole files."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from polyfocal.errors import UserError

T = TypeVar("T")

_XML_HEAD = 4096  # characters: more than any prologue
_XML_KINDS = {  # by the outermost element
    "annotation": ("Pascal VOC's XML", ""),
    "annotations": ("CVAT's XML", "in CVAT, export the task as COCO 1.0 instead"),
    "dataset": ("XML of dlib's imglab", "write the boxes as COCO's JSON"),
}
_TICK = 100_000_000  # nanoseconds, longer than the clock ticks of file systems


class DatasetError(UserError):
    """A data set, or results for one, cannot be used as it is."""


def read_text(file: Path) -> str:
    """The content of a text file in UTF-8, without a byte order mark.

    Raises:
        DatasetError: It cannot be read or is no such text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from None


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank, without the space around them.

    Raises:
        DatasetError: As :func:`read_text`.
    """
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def read_numbered(file: Path) -> list[str]:
    """The lines of a text file, as :func:`read_lines`, whose numbers have a meaning.

    Raises:
        DatasetError: As :func:`read_text`; or a line before the last is blank.
    """
    lines = [line.strip() for line in read_text(file).rstrip().splitlines()]
    if "" in lines:
        raise DatasetError(
            f"{file}, line {lines.index('') + 1} is blank, and the lines after it are numbered: "
            "remove it, or write what it stands for."
        )
    return lines


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DatasetError: It is none.
    """
    text = read_text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("<"):
            what, advice = xml_kind(text) or ("XML", "")
            advice = advice or "polyfocal convert makes a COCO folder of Pascal VOC's"
            raise DatasetError(f"{file} is {what} and not JSON: {advice}.") from None
        if error.msg == "Extra data" and error.lineno > 1:
            raise DatasetError(
                f"{file} has one JSON value per line, as ODVG and Labelbox write them: it must be "
                "one object with images, annotations and categories."
            ) from None
        raise DatasetError(
            f"{file} is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    except RecursionError:
        raise DatasetError(f"{file} is not a COCO file: its JSON is nested too deeply.") from None
    except ValueError:  # Python refuses very long numbers, because reading takes quadratic time
        raise DatasetError(
            f"{file} is not a COCO file: it has a number of thousands of digits."
        ) from None


def xml_kind(text: str) -> tuple[str, str] | None:
    """What an XML file is, and what to do about it; None if it is not known.

    Args:
        text: Its beginning.

    Returns:
        A noun and the end of a sentence, which is empty for the files that ``polyfocal convert``
        reads.
    """
    found = re.search(r"<\s*(annotations?|dataset)\b", text[:_XML_HEAD])
    return _XML_KINDS[found[1]] if found else None


def free_name(wanted: str, taken: set[str]) -> str:
    """A name that is not taken yet; it is added to ``taken``.

    Args:
        wanted: The name, or its beginning: ``a``, ``a_2``, ``a_3``.
        taken: The names that are taken.
    """
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


class Kept(Generic[T]):
    """What was read from files, kept for the next reader until one of the files changes.

    Args:
        most: How many results are kept: those that were used last.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[Hashable, tuple[list[tuple[int, int]], T]] = {}

    def get(self, key: Hashable, files: Iterable[Path], read: Callable[[], T]) -> T:
        """What is kept under a key, or what ``read`` returns.

        Args:
            key: The key of the result.
            files: All files that it depends on. If one cannot be accessed, ``read`` must say so.
            read: Reads the files.
        """
        try:
            stats = [file.stat() for file in files]
        except (OSError, ValueError):
            return read()
        states = [(stat.st_mtime_ns, stat.st_size) for stat in stats]
        kept_states, found = self._found.pop(key, ([], None))
        if found is None or kept_states != states:
            found = read()
        # A file may change twice between two ticks of its clock.
        if time.time_ns() - max(states, default=(0, 0))[0] > _TICK:
            self._found[key] = states, found
            while len(self._found) > self._most:
                del self._found[next(iter(self._found))]
        return found

    def forget(self, key: Hashable) -> None:
        """Free the memory."""
        self._found.pop(key, None)


@contextlib.contextmanager
def written_whole(file: str | Path) -> Iterator[Path]:
    """Have a file, and the folders that it is in, appear complete or not at all.

    Args:
        file: What is to be there in the end.

    Yields:
        The name to write to, beside it and with its ending.

    Raises:
        UserError: It cannot be written.
    """
    file = Path(file)
    part = file.with_name(f".{file.stem}.{os.getpid()}.part{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, file)
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, FileExistsError):
            reason = f"{file.parent} is not a folder"
        raise UserError(f"{file} cannot be written: {reason}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_text(file: str | Path, text: str) -> None:
    """Write a text file, complete or not at all.

    Raises:
        UserError: It cannot be written.
    """
    with written_whole(file) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def folder_written_whole(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Have a folder, and those that it is in, appear complete or not at all.

    Args:
        folder: What is to be there in the end.
        replace: Whether to replace a folder that is there and not empty.

    Yields:
        An empty folder beside it, to write to.

    Raises:
        OSError: It cannot be written.
    """
    folder = folder.resolve()  # nothing can be put in the place of a link to a folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        if replace:
            os.replace(folder, temporary / "old")
        os.replace(new, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def true_path(file: Path) -> Path:
    """The path of a file, which may be a link itself, without ``..`` and links to folders."""
    return Path(os.path.realpath(file.parent), file.name)


def identity(file: Path) -> tuple[int, int]:
    """What two paths have in common if they lead to one file, over links of any kind."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino


def is_new(folder: Path) -> bool:
    """Whether nothing is lost if a folder is written there: there is nothing, or an empty one."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
