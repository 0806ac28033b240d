"""The text of a record."""

from __future__ import annotations

from typing import Any, Final

LARGEST_RECORD: Final = 1 << 28
"""Maximum bytes of a record; a longer one counts as damaged."""
TOO_LONG: Final = f"is a record of more than {LARGEST_RECORD >> 20} MiB"
_KEYS_SHOWN = 8
_TYPES: Final = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "invalid UTF-8",
}


def text_of(record: Any, key: str) -> str:
    """The text of a parsed record.

    Raises:
        ValueError: there is none; the message says why.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:_KEYS_SHOWN]) or "none"
        raise ValueError(f"has no key {key!r} (its keys: {keys}); text_key names the key")
    return checked_text(record[key], key)


def checked_text(text: Any, key: str) -> str:
    """A record's text if it is one.

    Raises:
        ValueError: it is not; the message says why.
    """
    if not isinstance(text, str):
        found = _TYPES.get(type(text), type(text).__name__)
        raise ValueError(f"{key!r} is {found}, not text")
    if len(text) > LARGEST_RECORD:
        raise ValueError(TOO_LONG)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(f"{key!r} has half a surrogate pair (U+{code:04X})") from None
    return text
