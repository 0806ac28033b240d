"""What the parts of a build hand to each other: source files, units of work, documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["text", "jsonl", "parquet", "huggingface", "megatron"]
Compression = Literal["", "gzip", "zstd"]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    source: str
    """Name of its source."""
    name: str
    """Stable and unique within the source: relative to the given folder, or the file name."""
    path: Path
    size: int
    """Bytes, as stored."""
    kind: Kind
    compression: Compression = ""
    text_key: str = "text"
    part: Literal["both", "validation"] = "both"
    """validation: belongs to the source's own validation set."""


@dataclass(frozen=True)
class Unit:
    """A part of a file that one worker reads: all of it, or a range.

    jsonl: the lines that begin in the bytes [start, stop). text: these bytes of the only document.
    parquet, huggingface: the row groups or record batches [start, stop). Compressed files: all.
    """

    file: SourceFile
    start: int
    stop: int


@dataclass(frozen=True)
class Document:
    """One document: a record, or a plain text file."""

    key: str
    """Determines its side of the split: file name; with `@` and byte offset or row for records."""
    chunks: Iterable[str]
    """Its text in order, in chunks of any length; of a large text never all at once."""
