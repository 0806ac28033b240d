"""metrics.jsonl: one JSON object a line, every float at full precision."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from keel_megatron.config.errors import UserError
from keel_megatron.config.reading import lines_of, open_regular, parse_json


class Recordable(Protocol):
    """Whatever one line can hold: an object with a step."""

    def to_json(self) -> dict[str, Any]:
        """The object, with its `step`."""


class MetricsFile:
    """Appends records, each with the system as soon as it is written.

    Floats are written as Python's repr, so that they come back to the last bit. A loss that is not
    finite is written as NaN, Infinity or -Infinity: not strict JSON, but what Python's and pandas'
    readers take, and a null would hide which of the three it was.

    Args:
        path: the file; it is made if it is not there. A last line that a kill cut short is dropped.

    Raises:
        UserError: a line in the middle of the file is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.is_file() and not _ends_cleanly(path):
            _keep(path, last_step=None)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Recordable) -> None:
        """Append a record."""
        self._stream.write(json.dumps(record.to_json()) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, which the run is about to compute again.

        The file is replaced in one move: a kill leaves either the old one or the new one.

        Raises:
            UserError: a line in the middle of the file is no record.
        """
        self._stream.close()
        _keep(self._path, last_step=step)
        self._stream = self._path.open("a", encoding="utf-8", buffering=1)

    def clear(self) -> None:
        """Drop everything: the run starts from its beginning."""
        self._stream.close()
        self._stream = self._path.open("w", encoding="utf-8", buffering=1)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

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


def _keep(path: Path, last_step: int | None) -> None:
    """Replace the file by one with its whole records up to a step, byte for byte."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        for line, record in _records(path):
            if last_step is None or record["step"] <= last_step:
                stream.write(line + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _ends_cleanly(path: Path) -> bool:
    """Whether the file is empty or its last line has its end."""
    with open_regular(path) as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return True
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
