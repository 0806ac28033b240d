"""Tables as plain lines, and text that fits a terminal; counted nouns."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

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


def fitted(text: str, width: int) -> str:
    """A text in which no line is longer than a terminal is wide, if that is possible.

    Sentences are wrapped at words. The columns of a table that is too wide are shown in several
    tables, each with the first column. The second of two columns is wrapped within its column.

    Args:
        text: sentences and tables; columns are two or more spaces apart, words of a sentence one.
        width: the terminal's, in characters.
    """
    lines: list[str] = []
    for is_table, group in groupby(text.splitlines(), key=_is_row):
        block = list(group)
        if max(map(len, block)) <= width:
            lines += block
        elif is_table:
            lines += _table(block, width)
        else:
            for line in block:
                lines += _wrapped(line, width, "") if len(line) > width else [line]
    return "\n".join(lines)


def _is_row(line: str) -> bool:
    return re.search(r"\S {2,}\S", line) is not None


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _table(block: Sequence[str], width: int) -> Iterator[str]:
    """A table of at least two columns, narrower."""
    starts = [*_column_starts(block), max(map(len, block)) + 2]
    if len(starts) <= 3:
        for line in block:
            # The spaces between the columns are not to be wrapped.
            key, value = line[: starts[1]], line[starts[1] :]
            first, *others = _wrapped(value, max(1, width - len(key)), "") or [""]
            yield (key + first).rstrip()
            yield from (" " * starts[1] + other for other in others)
        return
    shown = 1
    while shown < len(starts) - 1:
        last = shown + 1
        while last < len(starts) - 1 and starts[1] + starts[last + 1] - starts[shown] - 2 <= width:
            last += 1
        if shown > 1:
            yield ""
        for line in block:
            yield (line[: starts[1]] + line[starts[shown] : starts[last]]).rstrip()
        shown = last


def _column_starts(block: Sequence[str]) -> list[int]:
    """Where the columns begin: after two characters that are blank in all rows."""
    longest = max(map(len, block))
    blank = [all(line[at : at + 1] in ("", " ") for line in block) for at in range(longest)]
    found = [at for at in range(longest) if not blank[at] and all(blank[max(0, at - 2) : at])]
    return found or [0]


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural if needed."""
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
