"""Text on a terminal: untrusted text is escaped; when there are colours and live lines."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Any

# Control characters (C0 except tab and line feed, delete, C1), characters that change the writing
# direction, and lone surrogates, which stand for bytes that are not valid text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BREAKS = re.compile("[\t\n\u2028\u2029]")


def printable(text: str, *, one_line: bool = False) -> str:
    """Escape the characters that control a terminal, as in Python's repr.

    Names, messages, logs and generated texts come from run folders, corpora and servers. An escape
    sequence in them could clear the screen, write the clipboard or hide later text.

    Args:
        text: any text.
        one_line: escape line breaks and tabs too, as for a name.
    """
    text = _UNSAFE.sub(_escape, text)
    return _BREAKS.sub(_escape, text) if one_line else text


def trusted(stream: Any) -> Any:
    """The stream for the program's own control sequences."""
    return getattr(stream, "trusted", stream)


def is_live(stream: Any) -> bool:
    """Whether a stream is a terminal on which a line can be replaced; None: it is closed."""
    return (
        stream is not None
        and bool(stream.isatty())
        and os.environ.get("TERM") not in ("dumb", "unknown")
    )


def width(stream: Any) -> int:
    """Characters in a line of the terminal behind a stream: $COLUMNS, its own, or else 80."""
    chosen = os.environ.get("COLUMNS", "")
    if chosen.isdecimal() and int(chosen):
        return int(chosen)
    # Not shutil's: it asks sys.__stdout__, which is detached once `keel` has wrapped it.
    with suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def has_colours(stream: Any) -> bool:
    """Whether output has colours and styles.

    Not with NO_COLOR (https://no-color.org), always with FORCE_COLOR, otherwise on a terminal.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or is_live(stream)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
