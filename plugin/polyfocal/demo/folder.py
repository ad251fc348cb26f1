"""Folders that a generator writes whole or not at all, and never over anything else."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyfocal.errors import UserError


def write_once(
    root: Path,
    *,
    what: str,
    settings_file: str,
    version: int,
    settings: dict[str, Any],
    fill: Callable[[Path], None],
    overwrite: bool,
) -> Path:
    """Have a folder filled, unless it holds the same already.

    Args:
        root: The folder to make; its parents are made as needed.
        what: What is in it, such as ``"digit scenes"``, for the sentences of errors.
        settings_file: Name of the JSON file, below ``root``, that tells what is in it.
        version: Of the generator.
        settings: Of the generator; what JSON makes of them is compared.
        fill: Writes the content into the folder that it is given, which exists.
        overwrite: Replace a folder of the same kind with other settings.

    Returns:
        ``root``.

    Raises:
        UserError: ``root`` holds something else or cannot be written.
    """
    wanted = {"version": version, "settings": json.loads(json.dumps(settings))}
    found = _settings_in(root / settings_file)
    if found == wanted:
        return root
    if found is not None and not overwrite:
        raise UserError(
            f"{root} holds {what} of other settings ({_difference(found, wanted)}); "
            "give another folder or ask to overwrite it."
        )
    if found is None and root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise UserError(f"{root} exists and holds no {what}; give a new or an empty folder.")

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            new = temporary / "new"
            new.mkdir()
            fill(new)
            (new / settings_file).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            if found is not None:
                os.replace(root, temporary / "old")
            os.replace(new, root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        # Another process may have finished the same set first.
        if _settings_in(root / settings_file) != wanted:
            raise UserError(f"Cannot write {what} to {root}: {error.strerror}.") from error
    return root


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
