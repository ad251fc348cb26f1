"""Tables for a terminal."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def table(
    title: str | None, header: Sequence[str], rows: Iterable[Sequence[str | float]], **style: Any
) -> Table:
    """A table of a column of names and columns of numbers.

    Args:
        title: Title above the table.
        header: Headers of the columns.
        rows: Texts as they are, numbers with three digits; "-" for NaN.
        style: See :class:`rich.table.Table`.
    """

    def shown(cell: str | float) -> Text:
        if isinstance(cell, str):
            return Text(cell)
        return Text("-" if math.isnan(cell) else f"{cell:.3f}")

    made = Table(title=title, **style)
    for number, name in enumerate(header):
        made.add_column(name, justify="right" if number else "left", no_wrap=bool(number))
    for row in rows:
        made.add_row(*map(shown, row))
    return made
