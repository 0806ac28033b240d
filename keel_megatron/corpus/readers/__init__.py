"""Read documents from source files, in bounded memory and in ranges that workers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from keel_megatron.corpus.documents import Document, SourceFile, Unit
from keel_megatron.corpus.readers.chat import read_chat, read_contents
from keel_megatron.corpus.readers.columns import parts, read_columns
from keel_megatron.corpus.readers.jsonl import read_jsonl
from keel_megatron.corpus.readers.rejected import BadRecord, Tally
from keel_megatron.corpus.readers.text import read_text

__all__ = ["BadRecord", "Tally", "read", "read_chat", "units"]


def units(file: SourceFile, size: int) -> list[Unit]:
    """Divide a file into units of about `size` bytes, in order.

    Plain text and compressed files are one unit; megatron files, which are not read, none.

    Raises:
        UserError: the file cannot be read.
    """
    if file.kind == "megatron":
        return []
    if file.kind == "text" or file.compression:
        return [Unit(file, 0, file.size)]
    if file.kind in ("jsonl", "chat"):
        end, step = file.size, size
    else:
        end = parts(file)
        step = max(end * size // max(file.size, 1), 1)
    return [Unit(file, start, min(start + step, end)) for start in range(0, end, step)]


def read(unit: Unit, on_bad: Callable[[BadRecord], None]) -> Iterator[Document]:
    """The documents of a unit, in order.

    The documents of a file do not depend on how it is divided into units. Of conversations it is
    what the messages say, for a sample of the text; `read_chat` reads them as they are.

    Args:
        unit: what to read.
        on_bad: called with each damaged or blank record, which is then skipped; usually a `Tally`.

    Raises:
        UserError: the file cannot be read, or changed since it was found.
    """
    if unit.file.kind == "text":
        return read_text(unit, on_bad)
    if unit.file.kind == "jsonl":
        return read_jsonl(unit, on_bad)
    if unit.file.kind == "chat":
        return read_contents(unit, on_bad)
    return read_columns(unit, on_bad)
