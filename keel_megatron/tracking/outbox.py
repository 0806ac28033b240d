"""What a run leaves for its followers beside metrics.jsonl: append-only files of JSON lines.

    outbox/events.jsonl              rank 0's event log: starts, each with the place that it reports
                                     to, tags, changed settings, files, rewinds, endings
    outbox/system-HOST.TIME.jsonl    a node's own measurements, the newest 32 MB

Nothing is deleted when it is delivered: with metrics.jsonl these files are the run's log, from
which MLflow's view can be rebuilt. A line is with the system as soon as it is written: no end of
the process loses it. A last line that a kill cut short is no event.

A start and a rewind say how many bytes of metrics.jsonl stay (`metrics`): the writer cuts the file,
then appends the event, then writes new records (run_log.py). So whoever reads metrics.jsonl, and
looks at the events before and after, knows whether what it has read still counts.
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
"""How much of a node's measurements is kept: some two days of 8 GPUs, measured every 10 s."""
_NUMBER = re.compile(r"[0-9]{1,15}")


class EventLog:
    """Appends events to a run's event log; any thread may.

    A full disk does not stop the run: what cannot be written is kept in memory (runtime/files.py).

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self._lines = LineFile(run / FOLDER / EVENTS_FILE)
        self._lock = threading.Lock()

    def append(self, kind: str, **values: Any) -> None:
        """Write an event, `values` being plain JSON; its `time` is now unless it is given."""
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
    """Appends a node's measurements; files and memory have a limit, and the oldest go.

    Args:
        run: the run's folder.
        node: the node's name.
        limit: bytes that are kept.
    """

    def __init__(self, run: Path, node: str, limit: int = SYSTEM_BYTES) -> None:
        self._folder = run / FOLDER
        self._stream = SYSTEM + node
        self._limit = limit
        self._lines: LineFile | None = None

    def append(self, values: dict[str, float]) -> None:
        """Write the values of now by their names in MLflow."""
        line = json.dumps({"kind": "system", "time": milliseconds(), "values": values})
        self._segment().append(line)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _segment(self) -> LineFile:
        """The file that the next line goes to."""
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
            # By the clock, so that no number comes again even if somebody deletes files.
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
    """Now, since 1970."""
    return time.time_ns() // 1_000_000


def relative(run: Path, path: Path) -> str:
    """A file's path as the event log keeps it: within the run's folder relative to it."""
    full, home = os.path.abspath(path), os.path.abspath(run)
    return os.path.relpath(full, home) if full.startswith(home + os.sep) else full
