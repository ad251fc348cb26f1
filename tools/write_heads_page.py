"""Writes the table of docs/heads.md from polyfocal.heads.

python tools/write_heads_page.py
"""

from pathlib import Path

from polyfocal import heads

PAGE = Path(__file__).resolve().parents[1] / "docs" / "heads.md"
BEGIN, END = "<!-- table of polyfocal.heads -->\n\n", "\n<!-- end of the table -->"


def written(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + heads.as_markdown() + END + rest.split(END)[1]


def main() -> None:
    """The command."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
