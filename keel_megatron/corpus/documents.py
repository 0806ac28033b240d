"""What the parts of a build hand to each other: sources, files, units of work, documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keel_megatron.data.manifest import Skipped

Kind = Literal["text", "jsonl", "parquet", "huggingface", "megatron", "chat"]
Compression = Literal["", "gzip", "zstd"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source. There may be millions, so paths are kept as text."""

    source: str
    """Name of its source."""
    name: str
    """Stable and unique within the source: relative to the given folder, or the file name."""
    location: str
    """Its path."""
    size: int
    """Bytes, as stored."""
    kind: Kind
    compression: Compression = ""
    text_key: str = "text"
    part: Literal["both", "validation"] = "both"
    """validation: belongs to the source's own validation set."""

    @property
    def path(self) -> Path:
        """Its path."""
        return Path(self.location)


@dataclass(frozen=True)
class Source:
    """One entry of `data.sources`, or all of `data.text`, with its files in a fixed order."""

    name: str
    kind: Kind | Literal["mixed"]
    """Format of its files; mixed: of several formats. megatron files are never mixed with others.
    """
    text_key: str
    weight: float | None
    files: tuple[SourceFile, ...]
    """megatron: for each prefix its .bin, then its .idx."""
    skipped: tuple[Skipped, ...]
    """What was not taken, by suffix and reason."""
    description: str
    """Where it is, for messages."""
    setting: str
    """Name of its setting, for messages: `data.text`, or `data.sources.N`."""

    @property
    def size(self) -> int:
        """Bytes of all files, as stored."""
        return sum(file.size for file in self.files)

    @property
    def prefixes(self) -> tuple[Path, ...]:
        """The prefixes of ready .bin and .idx pairs, in order."""
        bins = (file for file in self.files if file.kind == "megatron")
        return tuple(
            Path(file.location[: -len(".bin")]) for file in bins if file.location.endswith(".bin")
        )


@dataclass(frozen=True)
class Unit:
    """A part of a file that one worker reads: all of it, or a range.

    jsonl, chat: the lines that begin in the bytes [start, stop). text: the bytes [start, stop) of
    the only document. parquet, huggingface: the row groups or record batches [start, stop).
    Compressed files: all.
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
    """Its text in order, in chunks of any length; of a large text never all at once. To be read
    once."""
