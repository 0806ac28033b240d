"""Conversations: JSON lines whose objects have a list of messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from keel_megatron.corpus.documents import Document, Unit
from keel_megatron.corpus.readers.jsonl import read_records
from keel_megatron.corpus.readers.rejected import BadRecord
from keel_megatron.data.chat.messages import messages_of
from keel_megatron.data.chat.rendering import Messages

T = TypeVar("T")


def read_chat(
    unit: Unit, on_bad: Callable[[BadRecord], None], encode: Callable[[Messages], T]
) -> Iterator[tuple[str, T]]:
    """The encoded conversations of a unit, each with its `Document.key`.

    Args:
        unit: a unit of a chat file.
        on_bad: called with each damaged record, which is then skipped.
        encode: encodes a conversation; raises a ValueError if it cannot be.
    """
    key = unit.file.text_key
    return read_records(unit, on_bad, lambda record: encode(messages_of(record, key)))


def read_contents(unit: Unit, on_bad: Callable[[BadRecord], None]) -> Iterator[Document]:
    """What the messages of each conversation say, without a template."""
    for key, messages in read_chat(unit, on_bad, lambda messages: messages):
        yield Document(key, tuple(f"{message['content']}\n" for message in messages))
