"""Options that take names of a known set: checked by the parser, completed by the shell."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import typer

Known = Callable[[], Collection[str]]
"""The valid names; called when they are needed, because their module may be slow to import."""


def one_of(known: Known) -> dict[str, Any]:
    """Keyword arguments of `typer.Option` or `typer.Argument` for one name."""

    def check(value: str | None) -> str | None:
        """Refuse an unknown name."""
        _check([] if value is None else [value], known)
        return value

    def complete(incomplete: str) -> list[str]:
        """The names that begin so."""
        return [name for name in known() if name.startswith(incomplete)]

    return {"callback": check, "autocompletion": complete}


def some_of(known: Known) -> dict[str, Any]:
    """Keyword arguments of `typer.Option` for names with commas; the option may be repeated."""

    def check(values: list[str] | None) -> list[str] | None:
        """Refuse unknown names."""
        _check(listed(values), known)
        return values

    def complete(incomplete: str) -> list[str]:
        """The names that begin as the last one does, after those before it."""
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [
            f"{before}{comma}{name}"
            for name in known()
            if name.startswith(last) and name not in given
        ]

    return {"callback": check, "autocompletion": complete}


def listed(values: list[str] | None) -> tuple[str, ...]:
    """The values of a repeatable option, each of which may be several, with commas; each once."""
    parts = [part.strip() for value in values or () for part in value.split(",")]
    return tuple(dict.fromkeys(part for part in parts if part))


def _check(names: Collection[str], known: Known) -> None:
    for name in names:
        if name not in known():
            raise typer.BadParameter(f"{name!r} must be one of {', '.join(known())}")
