"""Text of others on a terminal, which obeys what it is sent."""

from __future__ import annotations

import re
from typing import Any

# Control characters (C0 but tab and line feed, delete, C1), what turns the direction of writing
# around, and halves of surrogate pairs, by which Python keeps bytes that are no text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BREAKS = re.compile("[\t\n\u2028\u2029]")


def printable(text: str, *, one_line: bool = False) -> str:
    """A text in which what would steer a terminal is shown, as in Python's repr, and not sent.

    Names, messages, logs and generated texts come from run folders, corpora and servers. An escape
    sequence in one may clear the screen, write the clipboard or hide what follows.

    Args:
        text: any.
        one_line: show line breaks and tabs as well, as for a name.
    """
    text = _UNSAFE.sub(_escape, text)
    return _BREAKS.sub(_escape, text) if one_line else text


def trusted(stream: Any) -> Any:
    """The stream to which our own display writes its control sequences."""
    return getattr(stream, "trusted", stream)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
