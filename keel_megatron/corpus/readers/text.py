"""Plain text: a file is one document."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

from keel_megatron.corpus.documents import Document, SourceFile, Unit
from keel_megatron.corpus.readers.rejected import BadRecord
from keel_megatron.corpus.readers.streams import DamagedError, blocks
from keel_megatron.errors import UserError

BOM = "\ufeff"


def read_text(unit: Unit, on_bad: Callable[[BadRecord], None]) -> Iterator[Document]:
    """The document of a file; none if it is blank or damaged.

    The text is checked before it is handed out: a document is given out whole or not at all.
    """
    file = unit.file
    is_blank = True
    try:
        for chunk in _decoded(file):  # all of it: each chunk is checked
            is_blank &= not chunk.strip()
    except DamagedError as error:
        on_bad(BadRecord(file, "file", 0, str(error), file.size))
    except _NotTextError as error:
        on_bad(BadRecord(file, "byte", error.offset, error.reason, file.size))
    else:
        if is_blank:
            on_bad(BadRecord(file, "file", 0, "is blank", file.size, blank=True))
        else:
            yield Document(file.name, _decoded(file))


class _NotTextError(Exception):
    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.reason = reason


def _decoded(file: SourceFile) -> Iterator[str]:
    """The text of a file, without a byte order mark, line ends untouched.

    Raises:
        DamagedError: the compressed file is damaged.
        _NotTextError: it is not UTF-8, or contains NUL bytes.
        UserError: the file cannot be read, or changed.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in blocks(file):
        nul = block.find(b"\0")
        if nul >= 0:
            raise _NotTextError(offset + nul, "is not text: it contains a NUL byte")
        text = _decode(decoder, block, offset)
        if text:
            yield text.removeprefix(BOM) if offset == 0 else text
        offset += len(block)
    _decode(decoder, b"", offset, final=True)
    if not file.compression and offset != file.size:
        raise UserError(f"{file.location} changed while it was read; restart when it is complete")


def _decode(
    decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool = False
) -> str:
    begun = len(decoder.getstate()[0])  # bytes of a character that the last block began
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise _NotTextError(offset - begun + error.start, "is not UTF-8 text") from None
