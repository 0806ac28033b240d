"""The format of a file, by its suffix and its first bytes."""

from __future__ import annotations

import codecs
import json
import os
import zlib
from typing import cast

from keel_megatron.config.data import Format
from keel_megatron.corpus.documents import Compression, Kind
from keel_megatron.corpus.packages import optional
from keel_megatron.corpus.skips import BLANK, UNREADABLE, suffix_of

HEAD = 1 << 16
"""Bytes of a file that are examined."""
JSON_LINES = (".jsonl", ".ndjson", ".jl")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow",)
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
MARKUP = (".json", ".csv", ".tsv", ".html", ".htm", ".xml")
"""Text formats whose syntax a model would learn."""
INDEX_MAGIC = b"MMIDIDX\x00\x00"
"""Begins a .idx file of Megatron-core."""
NOT_TEXT = "not readable UTF-8 text"
UTF_16 = "UTF-16 text, not UTF-8"
_MAGIC: dict[bytes, str] = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"\x04\x22\x4d\x18": "LZ4",
}
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class RefusedError(Exception):
    """A file that is not taken.

    Args:
        reason: for counts.
        detail: for a file that was named itself: what it is, and what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def classify(
    location: str, size: int, wanted: Format, text_key: str, *, named: bool
) -> tuple[Kind, Compression]:
    """The format and compression of a file.

    Args:
        location: its path.
        size: its bytes.
        wanted: the source's format.
        text_key: key of the text in records.
        named: given by its own path or a glob: its suffix need not be that of the wanted format.

    Raises:
        RefusedError: it is not of a format that is read.
        UserError: a package that reads it is missing.
    """
    head = _head_of(location)
    compression, content = _decompressed(head)
    suffix = suffix_of(location)
    for end in COMPRESSED:  # the content says whether it is compressed
        suffix = suffix.removesuffix(end)
    kind = _binary_kind(content, suffix, compression)
    if kind is None:
        kind = _text_kind(content, suffix, wanted, text_key, named=named)
        is_all = len(head) == size
        if kind == "text":
            _check_text(content, is_all=is_all and not compression)
        is_blank = not content.removeprefix(_BOM).decode(errors="ignore").strip()
        if is_blank and not compression and (is_all or _is_blank(location)):
            raise RefusedError(BLANK, "is blank")
    if wanted not in ("auto", kind):
        raise RefusedError(f"not {wanted}", f"is {kind}, not {wanted}")
    return kind, compression


def _head_of(location: str) -> bytes:
    try:
        # Without buffering and Path: this runs for each of maybe millions of files.
        descriptor = os.open(location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(descriptor, HEAD)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RefusedError(UNREADABLE, f"cannot be read: {error.strerror or error}") from error


def _decompressed(head: bytes) -> tuple[Compression, bytes]:
    """The compression, and the text of the first bytes as far as it can be decompressed."""
    if head.startswith(b"\x1f\x8b"):
        try:
            return "gzip", zlib.decompressobj(31).decompress(head, HEAD)
        except zlib.error:
            return "gzip", b""  # the reader reports it
    if head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == b"\x2a\x4d\x18":
        zstandard = optional("zstandard", "A .zst file")
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(head, read_across_frames=True)
            with reader as stream:
                return "zstd", cast(bytes, stream.read(HEAD))
        except zstandard.ZstdError:
            return "zstd", b""
    return "", head


def _binary_kind(content: bytes, suffix: str, compression: Compression) -> Kind | None:
    """The format of a file that is not text; None: it may be text.

    Raises:
        RefusedError: it is of a format that is not read.
    """
    kind: Kind | None = None
    if content.startswith(b"PAR1"):
        kind = "parquet"
    elif content.startswith(b"ARROW1\0\0") or (suffix in ARROW and content[:4] == b"\xff" * 4):
        kind = "huggingface"
    if kind and compression:
        raise RefusedError("unsupported format", f"is compressed with {compression}; decompress it")
    for magic, name in _MAGIC.items():
        if content.startswith(magic):
            raise RefusedError("unsupported compression", f"is a {name} file; use gzip or zstd")
    return kind


def _text_kind(content: bytes, suffix: str, wanted: Format, text_key: str, *, named: bool) -> Kind:
    """The format of a text file.

    Raises:
        RefusedError: it is of a format that is not read.
    """
    if wanted == "text":
        return "text"
    lines: Kind = "chat" if wanted == "chat" else "jsonl"
    if suffix in JSON_LINES or (wanted == lines and (named or suffix == ".json")):
        return lines
    if suffix == ".json" and _is_json_lines(content, text_key):
        return "jsonl"
    if suffix in (*PARQUET, *ARROW):
        raise RefusedError("damaged", f"is not a {suffix[1:].capitalize()} file, or is damaged")
    if suffix in MARKUP:
        raise RefusedError(
            "unsupported format",
            "is not of a supported format. Convert it to JSON lines, Parquet or plain text; or "
            "set `format: text` in an entry of data.sources to train on it as it is, syntax "
            "included",
        )
    return "text"


def _is_json_lines(content: bytes, text_key: str) -> bool:
    """Whether the first line is an object with the text key; a longer one only begins so."""
    line, newline, _ = content.lstrip().partition(b"\n")
    if not newline and len(content) >= HEAD:
        return line.startswith(b"{") and json.dumps(text_key).encode() in line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get(text_key), str)


def _check_text(content: bytes, *, is_all: bool) -> None:
    """Check that the first bytes of a file are UTF-8 text.

    Raises:
        RefusedError: they are not.
    """
    if content.startswith(_UTF_16):
        raise RefusedError(UTF_16, "is UTF-16 text; convert it to UTF-8")
    if b"\0" in content:
        raise RefusedError(NOT_TEXT, "is not text: it contains NUL bytes")
    try:
        if is_all:
            content.decode()
        else:
            codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError as error:
        raise RefusedError(
            NOT_TEXT, f"is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from None


def _is_blank(location: str) -> bool:
    """Whether a file contains only white space and a byte order mark."""
    with open(location, encoding="utf-8", errors="replace") as stream:
        while block := stream.read(HEAD):
            if block.strip():
                return False
    return True
