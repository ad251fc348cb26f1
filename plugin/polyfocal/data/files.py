"""Files that appear complete or not at all."""

import os
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a text file, which appears complete or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
