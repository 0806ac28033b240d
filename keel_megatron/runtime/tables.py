"""Tables as plain lines, the same on a terminal, in a pipe and in a log file; counted nouns."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

UNLIMITED = 100_000
"""Width in characters of a table that nothing cuts off or wraps."""


def table_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = ()
) -> list[str]:
    """The heading's line, then one a row; columns are as wide as they need to be.

    Args:
        columns: the headings.
        rows: the cells, one a column.
        left: positions of columns that are aligned to the left; the others are numbers.
    """
    from rich.console import Console  # not for every process that imports a table's module
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for position, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if position in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # a Text is shown as it is; markup would eat "[2,2]"
    text = io.StringIO()
    Console(file=text, width=UNLIMITED, color_system=None).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural if needed."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
