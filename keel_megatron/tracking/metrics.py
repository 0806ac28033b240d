"""metrics.jsonl: one JSON object per line, every float at full precision.

A line is a record of a step, a validation, an evaluation, a checkpoint or a depth profile, with the
`time` at which it was written, in milliseconds since 1970.
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

_IN_FOLDER = "metrics.jsonl"


class Recordable(Protocol):
    """A record with its `step`."""

    def to_json(self) -> dict[str, Any]:
        """The record as one object."""


class MetricsFile:
    """Appends records, each flushed to the system immediately.

    Floats are written as Python's repr, so that they are read back exactly. A non-finite loss is
    written as NaN, Infinity or -Infinity: not strict JSON, but Python and pandas read it, and a
    null would hide which of the three it was.

    While the disk is full, records are kept in memory (runtime/files.py).

    Args:
        path: the file; created if it does not exist. An incomplete last line is removed.
        say: called when writing fails, and when it works again.

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

    def rewind(
        self, step: int | None, truncated_to: Callable[[int], None] = lambda _size: None
    ) -> None:
        """Remove the records after `step`, which the run will compute again; all records for None.

        The file is truncated before the first of them, which needs no disk space. Records of
        earlier steps that follow it, from a save in the background, are written again.

        Args:
            step: the last step to keep.
            truncated_to: called with the file's size after the truncation, before anything is
            appended.

        Raises:
            UserError: a line in the middle of the file is not a record, or the file cannot be
            changed.
        """
        size, kept = (0, []) if step is None else self._until(step)
        with _refused(self._path):
            self._lines.cut(size, [])
            truncated_to(size)
            self._lines.cut(size, kept)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _until(self, step: int) -> tuple[int, list[bytes]]:
        """Size before the first record after `step`, and the later lines to keep."""
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


def read_metrics(run: Path | str, *names: str) -> list[dict[str, Any]]:
    """The records of a run, in the order in which they were written.

    Args:
        run: the run's folder, or its metrics.jsonl, which need not exist and may have an incomplete
            last line.
        names: only records that have all these keys, such as "loss": those of the steps.

    Raises:
        UserError: the folder has no metrics.jsonl, or a line in its middle is not a record.
    """
    path = Path(run)
    if path.suffix != ".jsonl" or path.is_dir():
        path /= _IN_FOLDER
        if not path.is_file():
            raise UserError(f"{run} has no {_IN_FOLDER}; a run's folder is runs/NAME")
    return [record for record in iterate_metrics(path) if all(name in record for name in names)]


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, which need not exist, as an iterator."""
    if path.is_file():
        for _line, record in _records(path):
            yield record


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of the file, without line ends, and their parsed records."""
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
                    f"{path}, line {number}: not the record of a step; "
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
    """Size of the file's complete lines, and the incomplete rest."""
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
