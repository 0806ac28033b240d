"""JSON lines: each line is an object, whose text is under one key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

from keel_megatron.corpus.documents import Document, Unit
from keel_megatron.corpus.readers.records import LARGEST_RECORD, TOO_LONG, text_of
from keel_megatron.corpus.readers.rejected import BadRecord, Place
from keel_megatron.corpus.readers.streams import DamagedError, blocks

_BOM = b"\xef\xbb\xbf"


T = TypeVar("T")


class BlankError(Exception):
    """A record without content, which is no error."""


def read_jsonl(unit: Unit, on_bad: Callable[[BadRecord], None]) -> Iterator[Document]:
    """The texts of the lines that begin in the unit's range; empty lines are none."""

    def text(record: Any) -> str:
        found = text_of(record, unit.file.text_key)
        if not found.strip():
            raise BlankError
        return found

    for key, found in read_records(unit, on_bad, text):
        yield Document(key, (found,))


def read_records(
    unit: Unit, on_bad: Callable[[BadRecord], None], convert: Callable[[Any], T]
) -> Iterator[tuple[str, T]]:
    """The records of the lines that begin in the unit's range, each with its `Document.key`.

    Args:
        unit: a unit of JSON lines.
        on_bad: called with each damaged or blank record, which is then skipped.
        convert: makes a record of its JSON; raises a ValueError for a damaged one and a BlankError
            for a blank one.
    """
    file = unit.file
    number = 0

    def reject(offset: int, reason: str, size: int, *, blank: bool = False) -> None:
        at, place = (number, "line") if file.compression else (offset, "byte")
        on_bad(BadRecord(file, cast(Place, place), at, reason, size, blank))

    try:
        for offset, line, size in _lines_in(unit):
            number += 1
            if line is not None and not line.strip():
                continue
            try:
                found = convert(_parsed(line))
            except BlankError:
                reject(offset, "is blank", size, blank=True)
            except ValueError as error:
                reject(offset, str(error), size)
            else:
                yield f"{file.name}@{offset}", found
    except DamagedError as error:
        on_bad(BadRecord(file, "line", number + 1, str(error)))


def _parsed(line: bytes | None) -> Any:
    """The JSON of a line.

    Raises:
        ValueError: it is none, or is too long (None); the message says why.
    """
    if line is None:
        raise ValueError(TOO_LONG)
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} of the line)") from None
    try:
        return json.loads(decoded)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from None


def _lines_in(unit: Unit) -> Iterator[tuple[int, bytes | None, int]]:
    """(offset, line without its end, size) of the lines that begin in a unit's range.

    A line of more than LARGEST_RECORD bytes is None.
    """
    if unit.file.compression:
        lines = _split(blocks(unit.file), 0)
        stop = None
    else:
        # The line that holds the byte before the range began there, or earlier.
        begin = max(unit.start - 1, 0)
        lines, stop = _split(blocks(unit.file, begin), begin), unit.stop
        if unit.start > 0:
            next(lines, None)
    for offset, line, size in lines:
        if stop is not None and offset >= stop:
            return
        yield offset, line.removeprefix(_BOM) if line and offset == 0 else line, size


def _split(chunks: Iterable[bytes], offset: int) -> Iterator[tuple[int, bytes | None, int]]:
    """(offset, line without its end, size) of all lines of a stream; lines end with LF."""
    pieces: list[bytes] = []
    size = 0
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            size += end - begin
            if size <= LARGEST_RECORD:
                pieces.append(chunk[begin:end])
                yield offset, b"".join(pieces), size
            else:
                yield offset, None, size
            begin = end + 1
            offset += size + 1
            pieces, size = [], 0
        size += len(chunk) - begin
        if size <= LARGEST_RECORD:
            pieces.append(chunk[begin:])
        else:
            pieces = []
    if size:
        yield offset, b"".join(pieces) if size <= LARGEST_RECORD else None, size
