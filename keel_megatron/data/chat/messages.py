"""The messages of a record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from keel_megatron.data.chat.rendering import ASSISTANT, Messages

ROLES: Final = ("system", "user", ASSISTANT)
_KEYS_SHOWN = 8


def messages_of(record: Any, key: str) -> Messages:
    """The messages of a parsed record, at least one of them the assistant's.

    Keys of a message other than `role` and `content` must be null: what they hold, such as calls
    of tools, would be missing from the text.

    Args:
        record: `{key: [{"role": ..., "content": ...}, ...]}`.
        key: key of the messages.

    Raises:
        ValueError: there are none; the message says why.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    if key not in record:
        keys = ", ".join(repr(name) for name in list(record)[:_KEYS_SHOWN]) or "none"
        raise ValueError(f"has no key {key!r} (its keys: {keys}); text_key names the key")
    found = check_messages(record[key], key)
    if all(message["role"] != ASSISTANT for message in found):
        raise ValueError(f"{key!r} has no message of the assistant, so no token would count")
    return found


def check_messages(messages: Any, key: str) -> Messages:
    """A list of messages without their null values, checked.

    Raises:
        ValueError: it is none; the message says why.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is not a list of messages")
    return [_message(message, f"message {n} of {key!r}") for n, message in enumerate(messages, 1)]


def check_names(messages: Messages, names: Iterable[str]) -> None:
    """Refuse messages that contain the name of a special token.

    A template's special tokens are found in the rendered text by their names, so such a message
    could end early, or speak for another role.

    Raises:
        ValueError: one does.
    """
    for number, message in enumerate(messages, 1):
        for name in names:
            if name in message["content"]:
                raise ValueError(f"message {number} contains {name!r}, the name of a special token")


def _message(message: Any, which: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{which} is not an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    if given.get("role") not in ROLES:
        raise ValueError(f"{which} has the role {given.get('role')!r}, not one of {_any(ROLES)}")
    if extra := given.keys() - {"role", "content"}:
        raise ValueError(f"{which} has {_any(sorted(extra))}; only role and content are supported")
    content = given.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{which} has no text as its content")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        code = ord(content[error.start])
        raise ValueError(f"{which} has half a surrogate pair (U+{code:04X})") from None
    return {"role": given["role"], "content": content}


def _any(names: Iterable[str]) -> str:
    return ", ".join(str(name)[:40] for name in names)
