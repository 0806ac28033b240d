"""Plain text: a file is one document."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

from keel_megatron.corpus.documents import Document, Unit
from keel_megatron.corpus.readers.rejected import BadRecord
from keel_megatron.corpus.readers.streams import DamagedError, blocks, opened
from keel_megatron.errors import UserError

BOM = "\ufeff"


def read_text(unit: Unit, on_bad: Callable[[BadRecord], None]) -> Iterator[Document]:
    """The document of a unit, or its part; none if it is blank or damaged.

    The text is checked before it is handed out: a document is given out whole or not at all.
    """
    start, stop, size = 0, None, unit.file.size
    if not unit.file.compression:
        start, stop = line_start(unit, unit.start), line_start(unit, unit.stop)
        size = stop - start
        if size <= 0:
            return
    try:
        is_blank = True
        for chunk in _decoded(unit, start, stop):  # all of it: each chunk is checked
            is_blank &= not chunk.strip()
    except DamagedError as error:
        on_bad(BadRecord(unit.file, "file", 0, str(error), size))
        return
    except _NotTextError as error:
        on_bad(BadRecord(unit.file, "byte", error.offset, error.reason, size))
        return
    if is_blank and size == unit.file.size:
        on_bad(BadRecord(unit.file, "file", 0, "is blank", size, blank=True))
        return
    yield Document(unit.file.name, _decoded(unit, start, stop))


class _NotTextError(Exception):
    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.reason = reason


def line_start(unit: Unit, at: int) -> int:
    """Offset of the first line that begins at or after `at`; the end if there is none."""
    if at <= 0 or at >= unit.file.size:
        return min(max(at, 0), unit.file.size)
    found = at - 1
    with opened(unit.file) as stream:
        stream.seek(found)
        while block := stream.read(1 << 16):
            newline = block.find(b"\n")
            if newline >= 0:
                return found + newline + 1
            found += len(block)
    return unit.file.size


def _decoded(unit: Unit, start: int, stop: int | None) -> Iterator[str]:
    """The text of a range of bytes, without a byte order mark, line ends untouched.

    Raises:
        _NotTextError: it is not UTF-8, or contains NUL bytes.
        UserError: the file changed meanwhile.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = start
    block = b""
    for block in blocks(unit.file, start, stop):
        nul = block.find(b"\0")
        if nul >= 0:
            raise _NotTextError(offset + nul, "is not text: it contains a NUL byte")
        text = _decode(decoder, block, offset)
        if text:
            yield text.removeprefix(BOM) if offset == 0 else text
        offset += len(block)
    _decode(decoder, b"", offset, final=True)
    if stop is not None and offset != stop:
        raise UserError(f"{unit.file.location} changed while it was read; restart when it is whole")


def _decode(
    decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool = False
) -> str:
    begun = len(decoder.getstate()[0])  # bytes of a character that the last block began
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise _NotTextError(offset - begun + error.start, "is not UTF-8 text") from None
