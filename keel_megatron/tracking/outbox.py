"""The rest of the run log, beside metrics.jsonl: append-only files of JSON lines.

    outbox/events.jsonl              rank 0's event log: starts, each with the address that it
                                     reports to, tags, changed settings, files, rewinds, endings,
                                     and evaluations by other processes
    outbox/system-HOST.TIME.jsonl    a node's own measurements, the newest 32 MB

Nothing is deleted after delivery: with metrics.jsonl these files are the run's log, from which
MLflow's database can be rebuilt. Each line is flushed to the system immediately, so the end of the
process does not lose it. An incomplete last line is ignored.

A start and a rewind contain the remaining size of metrics.jsonl (`metrics`): the writer truncates
the file, then appends the event, then appends new records (run_log.py). So a reader that reads the
events before and after metrics.jsonl knows whether its records are valid.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from keel_megatron.runtime.files import LineFile

FOLDER = "outbox"
EVENTS_FILE = "events.jsonl"
SYSTEM = "system-"
"""Beginning of the streams of nodes' measurements."""
SEGMENT_BYTES = 8_000_000
SYSTEM_BYTES = 32_000_000
"""Bytes of a node's measurements to keep: about two days of 8 GPUs, measured every 10 s."""
_NUMBER = re.compile(r"[0-9]{1,15}")


class EventLog:
    """Appends events to a run's event log; thread-safe.

    A full disk does not stop the run: unwritten lines are kept in memory (runtime/files.py).

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._lines = LineFile(run / FOLDER / EVENTS_FILE)
        self._lock = threading.Lock()

    def append(self, kind: str, **values: Any) -> None:
        """Write an event; `values` must be JSON. Default of its `time`: now."""
        line = json.dumps({"kind": kind, "time": milliseconds(), **values})
        with self._lock:
            self._lines.append(line, must=True)

    @property
    def unwritten(self) -> int:
        """Events that are in memory only."""
        return len(self._lines.kept)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._lines.close()


class MeasurementLog:
    """Appends a node's measurements; files and memory are limited, and the oldest are deleted.

    Args:
        run: the run's folder.
        node: the node's name.
        limit: bytes to keep.
    """

    def __init__(self, run: Path, node: str, limit: int = SYSTEM_BYTES) -> None:
        self._folder = run / FOLDER
        self._stream = SYSTEM + node
        self._limit = limit
        self._lines: LineFile | None = None

    def append(self, values: dict[str, float]) -> None:
        """Write the current values, by their names in MLflow."""
        line = json.dumps({"kind": "system", "time": milliseconds(), "values": values})
        self._segment().append(line)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _segment(self) -> LineFile:
        """The file for the next line."""
        size = min(SEGMENT_BYTES, self._limit // 4)
        if self._lines is not None and self._lines.written > size and not self._lines.kept:
            self._lines.close()
            self._lines = None
        if self._lines is None:
            known = segments(self._folder, self._stream)
            sizes = [path.stat().st_size for _number, path in known]
            for position, (_number, path) in enumerate(known):
                if sum(sizes[position:]) + size > self._limit:
                    path.unlink(missing_ok=True)
            # By the clock, so that no number is reused even if files are deleted.
            number = max(milliseconds(), known[-1][0] + 1 if known else 0)
            self._lines = LineFile(self._folder / f"{self._stream}.{number}.jsonl")
        return self._lines


def segments(folder: Path, stream: str) -> list[tuple[int, Path]]:
    """(number, path) of a stream's files in order."""
    found = []
    with suppress(OSError):
        for path in folder.glob(f"{stream}.*.jsonl"):
            number = path.name[len(stream) + 1 : -len(".jsonl")]
            if _NUMBER.fullmatch(number):
                found.append((int(number), path))
    return sorted(found)


def milliseconds() -> int:
    """The current time, since 1970."""
    return time.time_ns() // 1_000_000


def relative(run: Path, path: Path) -> str:
    """A file's path in the event log: relative if it is in the run's folder."""
    full, home = os.path.abspath(path), os.path.abspath(run)
    return os.path.relpath(full, home) if full.startswith(home + os.sep) else full
