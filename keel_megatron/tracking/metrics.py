"""metrics.jsonl: one JSON object a line, every float at full precision.

A line is a record of a step, a validation, a checkpoint or a depth profile, with the `time` at
which it was written, in milliseconds since 1970.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from keel_megatron.config.reading import lines_of, open_regular, parse_json
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import LineFile, whole_lines
from keel_megatron.tracking.outbox import milliseconds


class Recordable(Protocol):
    """Whatever one line can hold: a record with its `step`."""

    def to_json(self) -> dict[str, Any]:
        """The record as one object."""


class MetricsFile:
    """Appends records, each with the system as soon as it is written.

    Floats are written as Python's repr, so that they come back to the last bit. A loss that is not
    finite is written as NaN, Infinity or -Infinity: not strict JSON, but what Python's and pandas'
    readers take, and a null would hide which of the three it was.

    While the disk is full, records are kept in memory (runtime/files.py).

    Args:
        path: the file; it is made if it is not there. A last line that a kill cut short is dropped.
        say: told when it cannot be written, and when it can be again.

    Raises:
        UserError: the file cannot be changed.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda _text: None) -> None:
        self._path = path
        self._lines = LineFile(path, say)
        with _refused(path):
            size, tail = _ending(path)
            self._lines.cut(size, [tail + b"\n"] if _is_record(tail) else [])

    def write(self, record: Recordable) -> None:
        """Append a record."""
        self._lines.append(json.dumps({**record.to_json(), "time": milliseconds()}))

    def rewind(self, step: int | None, cut_to: Callable[[int], None] = lambda _size: None) -> None:
        """Drop the records after `step`, which the run is about to compute again; all for None.

        The file is cut before the first of them, which needs no room on the disk. What a save on
        its way has noted behind it of an earlier step is written anew.

        Args:
            step: the last that stays.
            cut_to: told the file's size once it is cut, before anything is written to it again.

        Raises:
            UserError: a line in the middle of the file is no record, or it cannot be changed.
        """
        size, kept = (0, []) if step is None else self._until(step)
        with _refused(self._path):
            self._lines.cut(size, [])
            cut_to(size)
            self._lines.cut(size, kept)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _until(self, step: int) -> tuple[int, list[bytes]]:
        """Bytes before the first record after `step`, and the lines behind it that stay."""
        size, kept, cut = 0, list[bytes](), False
        if self._path.is_file():
            for line, record in _records(self._path):
                cut = cut or record["step"] > step
                if not cut:
                    size += len(line) + 1
                elif record["step"] <= step:
                    kept.append(line + b"\n")
        kept += [line for line in self._lines.kept if json.loads(line)["step"] <= step]
        return size, kept

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a kill cut short is left out.

    Raises:
        UserError: a line in the middle of the file is no record.
    """
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after the other."""
    if path.is_file():
        for _line, record in _records(path):
            yield record


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines as they stand in the file, without their end, and what they say."""
    with open_regular(path) as stream:
        lines = enumerate(_lines(stream, path), start=1)
        for number, line in lines:
            try:
                record = parse_json(line)
                if not isinstance(record, dict) or not _is_step(record.get("step")):
                    raise ValueError("no object with a step")
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise UserError(
                    f"{path}, line {number}: no record of a step; "
                    "remove the line, or move the file away"
                ) from error
            yield line.rstrip(b"\n"), record


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**15


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from lines_of(stream)
    except ValueError as error:
        raise UserError(f"{path}: {error}, so no metrics; move the file away") from None


def _ending(path: Path) -> tuple[int, bytes]:
    """Bytes of the file's whole lines, and what a kill has left behind them."""
    if not path.is_file():
        return 0, b""
    with open_regular(path) as stream:
        size = whole_lines(stream.fileno())
        stream.seek(size)
        return size, stream.read()


def _is_record(line: bytes) -> bool:
    with suppress(ValueError):
        record = parse_json(line)
        return isinstance(record, dict) and _is_step(record.get("step"))
    return False


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"training.runs_dir: cannot write {path}: {error.strerror}") from error
