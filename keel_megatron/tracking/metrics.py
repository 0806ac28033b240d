"""metrics.jsonl: one JSON object a line, every float at full precision."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from keel_megatron.tracking.records import Record


class MetricsFile:
    """Appends records, each flushed when it is written.

    A not-finite loss is written as JSON's unofficial NaN or Infinity, which Python's, MLflow's and
    pandas' readers take.

    Args:
        path: the file.
        resume_step: keep the records up to this step and drop later ones, which the run is about
            to compute again; None starts an empty file.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = [] if resume_step is None else _upto(read_metrics(path), resume_step)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in kept)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a record."""
        self._stream.write(json.dumps(record.values()) + "\n")
        self._stream.flush()

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
    """The records of a metrics file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _upto(records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [record for record in records if record["step"] <= step]
