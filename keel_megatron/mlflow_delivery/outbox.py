"""What waits to be delivered to MLflow: append-only files of JSON lines in the run's folder.

    spool/events.000001.jsonl        rank 0's: starts, each with the place that it reports to
                                     (target.py), values, files, tags, changed settings, rewinds,
                                     the ending
    spool/system-HOST.000001.jsonl   a node's own measurements
    spool/delivered.json             how far MLflow has them, replaced in one move
    spool/target.json                that place, of starts by earlier versions
    spool/lock                       held by the courier that delivers

Only the training process writes a stream and only one courier reads it, so neither waits for the
other. Every start of a writer begins a new file, and so does every file that has grown large;
delivered files are deleted, and the others have a limit (SpoolWriter). A last line that a kill cut
short is no item.

A line is with the system as soon as it is written: no end of the process loses it. It is not
synced to the disk: a node that loses its power may lose its last seconds, as metrics.jsonl may.
An item may come twice, when the courier dies between a delivery and its note of it: MLflow's
database stores take a point of the same step, time and value as the same.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import lines_of, open_regular, parse_json, read_small
from keel_megatron.runtime.files import LineFile, write_whole

FOLDER = "spool"
EVENTS = "events"
SYSTEM = "system-"
POINTS = ("metrics", "system")
"""Kinds of items that hold points."""
SEGMENT_BYTES = 8_000_000
EVENTS_BYTES = 256_000_000
"""How large rank 0's stream grows while MLflow does not answer: some 600,000 steps."""
SYSTEM_BYTES = 32_000_000
"""Likewise a node's own: some two days of a node with 8 GPUs, at a measurement every 10 s."""
UNWRITTEN_BYTES = 16_000_000
"""How much is kept in memory while the disk is full."""
LOOK_SECONDS = 10.0
_DELIVERED = "delivered.json"
_NUMBER = re.compile(r"[0-9]{1,15}")


class SpoolWriter:
    """Appends items to a stream; any thread may.

    A full disk does not stop the run: what cannot be written is kept in memory (runtime/files.py).
    While nobody delivers, neither files nor memory grow without limit: once they have reached it,
    points are left out until there is room again. All else is kept.

    Args:
        run: the run's folder.
        stream: name of the stream.
        limit: bytes of its files from which on points are left out.

    Attributes:
        left_out: points that were left out for want of room.
    """

    def __init__(self, run: Path, stream: str, limit: int = EVENTS_BYTES) -> None:
        self._folder = run / FOLDER
        self._stream = stream
        self._limit = limit
        self._is_full = False
        self._look_at = -math.inf
        self.left_out = 0
        self._lock = threading.Lock()
        self._lines: LineFile | None = None
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)

    def append(self, kind: str, **values: Any) -> None:
        """Write an item, `values` being plain JSON."""
        line = json.dumps({"kind": kind, **values})
        with self._lock:
            if kind in POINTS and self._has_no_room():
                self.left_out += len(values["values"])
            else:
                self._segment().append(line, must=True)

    @property
    def unwritten(self) -> int:
        """Items that are in memory only."""
        return 0 if self._lines is None else len(self._lines.kept)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._lines is not None:
                self._lines.close()

    def _has_no_room(self) -> bool:
        now, lines = time.monotonic(), self._segment()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            lines.write()
            self._is_full = _bytes_of(self._folder, self._stream) >= self._limit
        return self._is_full or lines.kept_bytes >= UNWRITTEN_BYTES

    def _segment(self) -> LineFile:
        """The file that the next item goes to."""
        if self._lines is not None and self._lines.written > SEGMENT_BYTES and not self._lines.kept:
            self._lines.close()
            self._lines = None
        if self._lines is None:
            number = max((n for n, _ in segments(self._folder, self._stream)), default=0) + 1
            number = max(number, read_position(self._folder).get(self._stream, (0, 0))[0] + 1)
            self._lines = LineFile(self._folder / f"{self._stream}.{number:06d}.jsonl")
        return self._lines


@dataclass(frozen=True)
class Item:
    """One line of a stream."""

    stream: str
    segment: int
    end: int
    """Where the line ends in its file, in bytes."""
    values: dict[str, Any]

    @property
    def kind(self) -> str:
        """What it is: start, metrics, system, tags, changes, artifact, rewind or end."""
        return str(self.values["kind"])

    @property
    def place(self) -> tuple[int, int]:
        """Its file and its end there: later items have a greater one."""
        return self.segment, self.end


_FIELDS: dict[str, dict[str, type]] = {
    "start": {"name": str, "time": int},
    "metrics": {"step": int, "values": dict, "time": int},
    "system": {"values": dict, "time": int},
    "tags": {"tags": dict},
    "changes": {"changes": list},
    "artifact": {"path": str},
    "rewind": {"back_to": int, "time": int},
    "end": {"status": str, "time": int},
}


def _is_item(values: Any) -> bool:
    """Whether a line has what its kind must have: not every line need be a writer's."""
    if not isinstance(values, dict):
        return False
    fields = _FIELDS.get(str(values.get("kind")), {"kind": str})
    back_to = values.get("back_to")
    return all(isinstance(values.get(name), kind) for name, kind in fields.items()) and (
        back_to is None or isinstance(back_to, int)
    )


def segments(folder: Path, stream: str) -> list[tuple[int, Path]]:
    """(number, path) of a stream's files in order; `folder` is the spool."""
    found = []
    for path in folder.glob(f"{stream}.*.jsonl"):
        number = path.name[len(stream) + 1 : -len(".jsonl")]
        if _NUMBER.fullmatch(number):
            found.append((int(number), path))
    return sorted(found)


def _bytes_of(folder: Path, stream: str) -> int:
    """Size of a stream's files; those that are delivered meanwhile count as nothing."""
    size = 0
    for _number, path in segments(folder, stream):
        with suppress(OSError):
            size += path.stat().st_size
    return size


def read_position(folder: Path) -> dict[str, tuple[int, int]]:
    """How far every stream is delivered: (file, byte)."""
    with suppress(AttributeError, TypeError, ValueError):
        return {name: (int(s), int(e)) for name, (s, e) in _note(folder).get("streams", {}).items()}
    return {}


def _note(folder: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(read_small(folder / _DELIVERED)))
    except (OSError, ValueError, TypeError):
        return {}


class SpoolReader:
    """What of a run's spool is not delivered yet.

    Values after the step that a later start or rewind goes back to are left out: the run computes
    them again.

    Args:
        run: the run's folder.

    Attributes:
        session: what the last delivered start said, and whether its end is delivered (`open`).
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        note = _note(self.folder)
        session = note.get("session")
        self.session: dict[str, Any] = session if isinstance(session, dict) else {}
        self._position = read_position(self.folder)
        self._scanned = self._position.get(EVENTS, (0, 0))
        self._turns: list[tuple[tuple[int, int], int]] = []
        self.last_start: dict[str, Any] = dict(self.session)
        self.ended = not self.session.get("open", False)

    def scan(self) -> None:
        """Look ahead, over what has come since the last look, for starts, rewinds and ends."""
        for item in self._lines(EVENTS, self._scanned):
            self._scanned = item.place
            if item.kind == "start":
                self.last_start, self.ended = item.values, False
            elif item.kind == "end":
                self.ended = True
            back_to = item.values.get("back_to")
            if back_to is not None:
                self._turns.append((item.place, int(back_to)))

    def waiting(self) -> Iterator[Item]:
        """The items that are to be delivered: events first, in their order."""
        self.scan()
        for stream in self._streams():
            for item in self._lines(stream, self._position.get(stream, (0, 0))):
                if not self._is_overtaken(item):
                    yield item

    def commit(self, items: list[Item]) -> None:
        """Note that these are delivered (or given up), with all before them; delete their files."""
        for item in items:
            self._position[item.stream] = max(self._position.get(item.stream, (0, 0)), item.place)
            if item.kind == "start":
                self.session = {**item.values, "open": True}
            elif item.kind == "end":
                self.session["open"] = False
        self._turns = [t for t in self._turns if t[0] > self._position.get(EVENTS, (0, 0))]
        self.write_note()
        for stream in {item.stream for item in items}:
            for number, path in segments(self.folder, stream):
                if number < self._position[stream][0]:
                    path.unlink(missing_ok=True)

    def write_note(self) -> None:
        """Keep how far everything is delivered."""
        note = {"streams": self._position, "session": self.session}
        write_whole(self.folder / _DELIVERED, json.dumps(note))

    def tidy(self, streams: list[str] | None = None) -> None:
        """Delete the files that are delivered to their end; their writers must be gone.

        Args:
            streams: whose; None = all.
        """
        for stream in self._streams() if streams is None else streams:
            last, end = self._position.get(stream, (0, 0))
            for number, path in segments(self.folder, stream):
                done = number < last or (number == last and path.stat().st_size <= end)
                if done or path.stat().st_size == 0:
                    path.unlink(missing_ok=True)

    def _streams(self) -> list[str]:
        names = {path.name.rsplit(".", 2)[0] for path in self.folder.glob("*.*.jsonl")}
        return sorted(names, key=lambda name: (name != EVENTS, name))

    def _is_overtaken(self, item: Item) -> bool:
        if item.kind != "metrics":
            return False
        return any(
            place > item.place and item.values["step"] > back_to for place, back_to in self._turns
        )

    def _lines(self, stream: str, after: tuple[int, int]) -> Iterator[Item]:
        """Whole lines of a stream after a place."""
        for number, path in segments(self.folder, stream):
            if number < after[0]:
                continue
            end = after[1] if number == after[0] else 0
            with open_regular(path) as file:
                file.seek(end)
                for line in lines_of(file):
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    with suppress(ValueError):
                        values = parse_json(line)
                        if _is_item(values):
                            yield Item(stream, number, end, values)


@dataclass(frozen=True)
class Waiting:
    """How much of a spool is not delivered."""

    points: int = 0
    files: int = 0
    status: str | None = None
    """The ending that MLflow does not know yet."""

    @classmethod
    def of(cls, run: Path) -> Waiting:
        """Count a run's."""
        points = files = 0
        status: str | None = None
        for item in SpoolReader(run).waiting():
            points += len(item.values.get("values", ()))
            files += item.kind == "artifact"
            status = item.values["status"] if item.kind == "end" else status
        return cls(points, files, status)

    def __bool__(self) -> bool:
        return bool(self.points or self.files or self.status)

    def __str__(self) -> str:
        parts = [f"{self.points:,} point(s)"]
        if self.files:
            parts.append(f"{self.files} file(s)")
        if self.status:
            parts.append(f"the status {self.status}")
        return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def relative(run: Path, path: Path) -> str:
    """A file's path as the spool keeps it: within the run's folder relative to it."""
    full, home = os.path.abspath(path), os.path.abspath(run)
    return os.path.relpath(full, home) if full.startswith(home + os.sep) else full
