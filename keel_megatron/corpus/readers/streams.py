"""Streams of a file's uncompressed bytes, in bounded memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from keel_megatron.config.reading import open_regular
from keel_megatron.corpus.documents import SourceFile
from keel_megatron.corpus.packages import optional
from keel_megatron.errors import UserError

CHUNK = 1 << 20
"""Bytes that are read, decompressed and decoded at a time."""


_ZSTD_INPUT = 1024
"""Compressed bytes at a time; they give at most 32 MiB, as a block of 128 KiB takes 4 bytes."""


class DamagedError(Exception):
    """A compressed file is truncated or damaged; the message says which."""


def opened(file: SourceFile) -> BinaryIO:
    """Open a file as it was when it was found.

    Raises:
        UserError: the file cannot be read, or its size changed.
    """
    try:
        stream = open_regular(file.path)
        stream.seek(0, 2)
        size = stream.tell()
        stream.seek(0)
    except OSError as error:
        raise unreadable(file, error) from error
    if size != file.size:
        stream.close()
        raise UserError(
            f"{file.location} changed while it was read ({file.size} bytes, then {size}); restart "
            "when the file is complete"
        )
    return stream


def unreadable(file: SourceFile, error: OSError) -> UserError:
    """The error for a file that cannot be read."""
    return UserError(f"{file.location} cannot be read: {error.strerror or error}")


def blocks(file: SourceFile, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in blocks of at most about CHUNK bytes.

    Args:
        file: the file.
        start: offset of the first byte; of uncompressed files only.
        stop: offset after the last byte; None: the end.

    Raises:
        DamagedError: the compressed file is truncated or damaged.
        UserError: the file cannot be read, or changed.
    """
    with opened(file) as stream:
        try:
            if file.compression == "gzip":
                yield from _gathered(_gunzip(stream))
            elif file.compression == "zstd":
                yield from _gathered(_unzstd(stream))
            else:
                stream.seek(start)
                yield from _plain(stream, None if stop is None else stop - start)
        except OSError as error:
            raise unreadable(file, error) from error


def _plain(stream: BinaryIO, size: int | None) -> Iterator[bytes]:
    while block := stream.read(CHUNK if size is None else min(CHUNK, size)):
        yield block
        if size is not None:
            size -= len(block)


def _gathered(small: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks of about CHUNK bytes; of a damaged file all that is before the damage."""
    held: list[bytes] = []
    size = 0
    try:
        for block in small:
            held.append(block)
            size += len(block)
            if size >= CHUNK:
                yield b"".join(held)
                held, size = [], 0
    except DamagedError:
        yield b"".join(held)
        raise
    yield b"".join(held)


def _gunzip(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a gzip file of any number of members.

    Raises:
        DamagedError: it is truncated or damaged.
    """
    with gzip.GzipFile(fileobj=stream) as file:
        try:
            while block := file.read1(CHUNK):
                yield block
        except EOFError:
            raise DamagedError("the gzip file is truncated") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DamagedError(f"the gzip file is damaged ({error})") from None


def _unzstd(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a zstd file of any number of frames.

    Raises:
        DamagedError: it is truncated or damaged.
        UserError: the package zstandard is missing.
    """
    zstandard = optional("zstandard", "Reading a .zst file")
    decompressor = zstandard.ZstdDecompressor()
    frame, is_between, compressed = decompressor.decompressobj(), True, b""
    while compressed or (compressed := stream.read(_ZSTD_INPUT)):
        try:
            yield frame.decompress(compressed)
        except zstandard.ZstdError as error:
            raise DamagedError(f"the zstd file is damaged ({error})") from None
        is_between, compressed = frame.eof, frame.unused_data
        if is_between:
            frame = decompressor.decompressobj()
    if not is_between:
        raise DamagedError("the zstd file is truncated")
