"""Which documents of a source are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from keel_megatron.corpus.documents import Source, SourceFile
from keel_megatron.corpus.readers.streams import opened, unreadable

ALL: Final = 1 << 64
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


def key_hash(key: str) -> int:
    """Position of a document in a fixed random order, from 0 to 2^64 - 1."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big")


def limit_of(source: Source, fraction: float) -> int:
    """Documents with a smaller `key_hash` are held out; 0: the source has validation files.

    Where every file is a document, about `fraction` of them are held out, at least one, and one
    stays. The number of records is not known before they are read, so of them it is each with
    probability `fraction`.
    """
    if any(file.part == "validation" for file in source.files):
        return 0
    if source.kind != "text":
        return int(fraction * ALL)
    count = len(source.files)
    if count == 1:
        return 0
    hashes = sorted(key_hash(file.name) for file in source.files)
    return hashes[min(count - 1, max(1, round(fraction * count))) - 1] + 1


def is_single_text(source: Source) -> bool:
    """Whether the source is one uncompressed plain text, of which the end is held out."""
    return len(source.files) == 1 and source.kind == "text" and not source.files[0].compression


def split_offset(file: SourceFile, fraction: float) -> int:
    """Byte offset at which a plain text's validation part begins: after a line end if one is near.

    Raises:
        UserError: the file cannot be read.
    """
    total = sum(_characters(block) for block in _blocks(file, 0, file.size))
    at = int(total * (1.0 - fraction))
    # A long line is split inside: the previous line end could be at the beginning of the text.
    nearest = max(at - (total - at), 0)
    low, high = _offsets(file, (nearest, at))
    newline = _last_newline(file, low, high)
    return high if newline is None else newline + 1


def _offsets(file: SourceFile, wanted: Sequence[int]) -> list[int]:
    """Byte offsets of characters, of which the numbers ascend."""
    found: list[int] = []
    offset = passed = 0
    for block in _blocks(file, 0, file.size):
        count = _characters(block)
        while len(found) < len(wanted) and wanted[len(found)] < passed + count:
            starts = np.flatnonzero(_starts(block))
            found.append(offset + int(starts[wanted[len(found)] - passed]))
        offset += len(block)
        passed += count
    return found + [file.size] * (len(wanted) - len(found))


def _last_newline(file: SourceFile, start: int, stop: int) -> int | None:
    """Offset of the last line feed in a range of bytes."""
    found = None
    offset = start
    for block in _blocks(file, start, stop):
        place = block.rfind(b"\n")
        if place >= 0:
            found = offset + place
        offset += len(block)
    return found


def _characters(block: bytes) -> int:
    """Number of characters that begin in a block of UTF-8."""
    return int(np.count_nonzero(_starts(block)))


def _starts(block: bytes) -> np.ndarray:
    """Bool [bytes]: where a character begins."""
    starts: np.ndarray = (np.frombuffer(block, dtype=np.uint8) & 0xC0) != 0x80
    return starts


def _blocks(file: SourceFile, start: int, stop: int) -> Iterator[bytes]:
    """Blocks of a range of bytes; a byte order mark counts as no character, so it is left blank."""
    with opened(file) as stream:
        try:
            stream.seek(start)
            while start < stop and (block := stream.read(min(_BLOCK, stop - start))):
                if start == 0 and block.startswith(_BOM):
                    block = b"\x80\x80\x80" + block[3:]
                yield block
                start += len(block)
        except OSError as error:
            raise unreadable(file, error) from error
