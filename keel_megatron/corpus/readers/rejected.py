"""Records that are not taken: damaged ones and blank ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel_megatron.corpus.documents import SourceFile
from keel_megatron.errors import UserError

Place = Literal["byte", "line", "row", "file"]
_BLOCK = 1 << 20


@dataclass(frozen=True)
class BadRecord:
    """A damaged or blank record."""

    file: SourceFile
    place: Place
    """What `number` counts: lines from 1; rows and bytes from 0, bytes in the uncompressed file."""
    number: int
    reason: str
    """What is wrong, such as `has no key 'text'`."""
    bytes: int = 0
    """Its size, as far as known."""
    blank: bool = False
    """Blank: not an error, skipped always."""

    def where(self) -> str:
        """`FILE, line N`. Lines of JSON lines are counted here, as a range does not know them."""
        if self.place == "file":
            return self.file.location
        if self.place != "byte":
            return f"{self.file.location}, {self.place} {self.number:,}"
        if self.file.compression:
            return f"{self.file.location}, byte {self.number:,}"
        line = f"{self.file.location}, line {_line_of(self.file.location, self.number):,}"
        return line if self.file.kind in ("jsonl", "chat") else f"{line}, byte {self.number:,}"


class Tally:
    """Counts rejected records; the `on_bad` of `readers.read`.

    Args:
        on_bad_record: `data.on_bad_record`.
    """

    def __init__(self, on_bad_record: Literal["stop", "skip"]) -> None:
        self.on_bad_record = on_bad_record
        self.bad = self.bad_bytes = self.blank = self.blank_bytes = 0
        self.first_bad: BadRecord | None = None
        self.first_blank: BadRecord | None = None

    def __call__(self, record: BadRecord) -> None:
        """Count a record.

        Raises:
            UserError: it is damaged, and data.on_bad_record is `stop`.
        """
        if record.blank:
            self.blank += 1
            self.blank_bytes += record.bytes
            self.first_blank = self.first_blank or record
            return
        if self.on_bad_record == "stop":
            raise UserError(
                f"{record.where()}: {record.reason}. Repair it, or set data.on_bad_record to skip "
                "to leave damaged records out"
            )
        self.bad += 1
        self.bad_bytes += record.bytes
        self.first_bad = self.first_bad or record


def _line_of(location: str, offset: int) -> int:
    """Number of the line that begins at a byte offset, from 1."""
    lines = 1
    with open(location, "rb") as stream:
        while offset > 0 and (block := stream.read(min(_BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines
