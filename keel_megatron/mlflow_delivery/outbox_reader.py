"""Reader of a run's log, which tracks what is already delivered to MLflow.

Metrics.jsonl, the event log and the nodes' measurements (tracking/outbox.py) are only read;
`outbox/delivered.json` has the delivered bytes of each, and is replaced atomically. An item may be
delivered twice, if the process dies between a delivery and its note: MLflow's database stores treat
a point with the same name, step, time and value as the same.

The run truncates metrics.jsonl when it resumes or rolls back, then logs an event with the remaining
size, then appends new records. A batch of records is valid only if no truncation was logged between
the reads of the event log before and after it. If the event is lost, on a full disk or by a manual
change, the bytes before the noted position differ from those delivered, and the file is delivered
again from its beginning.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from keel_megatron.config.reading import lines_of, open_regular, parse_json
from keel_megatron.depth.profile import DepthProfile
from keel_megatron.mlflow_delivery import earlier_spool
from keel_megatron.mlflow_delivery.items import Item, is_item, note_in, one_call
from keel_megatron.runtime.files import write_whole
from keel_megatron.tracking.outbox import EVENTS_FILE, FOLDER, SYSTEM, segments
from keel_megatron.tracking.run_log import METRICS_FILE

_NOTE = "delivered.json"
_EVENTS, _METRICS = "events", "metrics"
_MARK_BYTES = 64
_LARGEST = 1 << 53


class OutboxReader:
    """Reads new items of a run's log, and notes what is delivered.

    Args:
        run: the run's folder.
        again: ignore the note, and deliver the current MLflow run again from its first start.
        whole: with `again`, also deliver the records before the first logged start, which an
            earlier version delivered; not in a copy, where they belong to another run.

    Attributes:
        session: values of the last delivered start.
        last_start: values of the last start.
        ended: whether the last start has logged its end.
    """

    def __init__(self, run: Path, *, again: bool = False, whole: bool = True) -> None:
        self.folder = run / FOLDER
        self._metrics_path = run / METRICS_FILE
        self.again = again
        self._whole = again and whole
        note: dict[str, Any] = {} if again else note_in(self.folder / _NOTE)
        self._at = {name: _byte(note.get(name)) for name in (_METRICS, _EVENTS)}
        self._first = _byte(note.get("first"))
        """Where the records of the MLflow run begin."""
        self._mark = (0, 0)
        self._system: dict[str, tuple[int, int]] = {}
        with suppress(AttributeError, TypeError, ValueError):
            begin, checksum = note.get("mark", self._mark)
            self._mark = (_byte(begin), _byte(checksum))
            streams = note.get("system", {}).items()
            self._system = {name: (_byte(number), _byte(byte)) for name, (number, byte) in streams}
        self._is_open = note.get("open") is True
        self.session: dict[str, Any] = {}
        self.last_start: dict[str, Any] = {}
        self.ended = not self._is_open
        self._scanned = 0
        self._cuts = 0
        self._pending: deque[Item] = deque()
        if again:
            self._at[_EVENTS] = self._last_beginning()

    def scan(self) -> None:
        """Read the events that were logged since the last look."""
        for item in self._events(self._scanned):
            self._scanned = item.place[1]
            if item.kind == "start":
                self.last_start = item.values
            if self._scanned <= self._at[_EVENTS]:
                self.session = {} if self.again else self.last_start
                continue
            if _is_cut(item):
                self._pending = deque(one for one in self._pending if not _is_void(one, item))
            self._pending.append(item)
            self._cuts += _is_cut(item)
            self.ended = (self.ended and item.kind != "start") or item.kind == "end"

    def batch(self) -> list[Item]:
        """The next items: points for one call, or one event; empty if everything is delivered.

        Records come before the event that they were written before.
        """
        self.scan()
        while True:
            cuts = self._cuts
            found = one_call(self._records()) or self._event() or one_call(self._measurements())
            self.scan()
            if self._cuts == cuts:
                return found

    def waiting(self) -> Iterator[Item]:
        """All that is to be delivered, as it stands now."""
        self.scan()
        at = self._records_from()
        if at is not None:
            yield from self._lines_of_metrics(at, None)
        yield from self._pending
        yield from self._measurements()

    def commit(self, items: list[Item]) -> None:
        """Note that these, and all before them, are delivered (or given up)."""
        for item in items:
            if item.stream == _EVENTS:
                self._pending.popleft()
                self._commit_event(item)
            elif item.stream == _METRICS:
                self._at[_METRICS], self._mark = item.place[1], item.mark
            else:
                self._system[item.stream] = item.place
        self._write_note()

    def close(self) -> None:
        """Note that the last start's end is delivered, although the run did not log it."""
        self._is_open, self.ended = False, True
        self._write_note()

    def _commit_event(self, item: Item) -> None:
        self._at[_EVENTS] = item.place[1]
        if item.kind == "start":
            if not self.session:  # what was there before is not for MLflow, or it has it
                self._first = 0 if self._whole else item.values["metrics"]
                self._at[_METRICS] = self._first
            self.session, self._is_open, self.again = item.values, True, False
        elif item.kind == "end":
            self._is_open = False
        if _is_cut(item):
            self._at[_METRICS] = min(self._at[_METRICS], item.values["metrics"])
            self._first = min(self._first, item.values["metrics"])
            begin = max(0, self._at[_METRICS] - _MARK_BYTES)
            self._mark = begin, self._checksum(begin, self._at[_METRICS])

    def _event(self) -> list[Item]:
        return [self._pending[0]] if self._pending else []

    def _records(self) -> Iterator[Item]:
        """Records that count now, before the next cut's place."""
        if not self.session:
            return
        limit = min((i.values["metrics"] for i in self._pending if _is_cut(i)), default=None)
        at = self._at[_METRICS]
        if limit is None or at < limit:
            yield from self._lines_of_metrics(at if self._is_same(at) else self._first, limit)

    def _records_from(self) -> int | None:
        """Where the records begin that MLflow lacks once the pending events are delivered."""
        at: int | None = None
        if self.session:
            at = self._at[_METRICS]
            at = at if self._is_same(at) else self._first
        for item in self._pending:
            if _is_cut(item):
                size = item.values["metrics"]
                at = (0 if self._whole else size) if at is None else min(at, size)
        return at

    def _lines_of_metrics(self, at: int, limit: int | None) -> Iterator[Item]:
        with suppress(FileNotFoundError), open_regular(self._metrics_path) as stream:
            stream.seek(at)
            for end, record, line in _lines(stream, at):
                if limit is not None and end > limit:
                    return
                tail = line[-_MARK_BYTES:]
                mark = (end - len(tail), zlib.crc32(tail))
                yield Item(_METRICS, (0, end), self._item(record), mark)

    def _item(self, record: Any) -> dict[str, Any]:
        """What a record is to MLflow; without values if the line is no record."""
        values: dict[str, float] = {}
        step, time = 0, self.session.get("time", 0)  # of an earlier version's record
        if isinstance(record, dict) and 0 <= _whole(record.get("step")) < _LARGEST:
            values, step = _points(record), record["step"]
            if 0 < _whole(record.get("time")) < _LARGEST:
                time = record["time"]
        return {"kind": "metrics", "step": step, "time": time, "values": values}

    def _measurements(self) -> Iterator[Item]:
        files = self.folder.glob(f"{SYSTEM}*.*.jsonl")
        for stream in sorted({path.name.rsplit(".", 2)[0] for path in files}):
            yield from self._measurements_of(stream, self._system.get(stream, (0, 0)))

    def _measurements_of(self, stream: str, after: tuple[int, int]) -> Iterator[Item]:
        for number, path in segments(self.folder, stream):
            if number < after[0]:
                continue
            begin = after[1] if number == after[0] else 0
            with suppress(FileNotFoundError), open_regular(path) as file:  # the oldest may go
                file.seek(begin)
                for end, values, _line in _lines(file, begin):
                    if is_item(values) and values["kind"] == "system":
                        yield Item(stream, (number, end), values)

    def _events(self, after: int) -> Iterator[Item]:
        with suppress(FileNotFoundError), open_regular(self.folder / EVENTS_FILE) as file:
            file.seek(after)
            for end, values, _line in _lines(file, after):
                if is_item(values) and values["kind"] not in ("metrics", "system"):
                    item = Item(_EVENTS, (0, end), values)
                    if not _is_cut(item) or type(values.get("metrics")) is int:
                        yield item

    def _last_beginning(self) -> int:
        """Where the event of the last start ends the MLflow run before it; 0 if none does."""
        before = found = 0
        for item in self._events(0):
            if item.kind == "start" and item.values.get("back_to") is None:
                found = before
            before = item.place[1]
        return found

    def _is_same(self, at: int) -> bool:
        """Whether the bytes before a delivered place are those that were delivered.

        A file that has become shorter says nothing yet: its cut is about to be logged.
        """
        with suppress(FileNotFoundError):
            begin, checksum = self._mark
            if self._metrics_path.stat().st_size >= at:
                return self._checksum(min(begin, at), at) == checksum
        return True

    def _checksum(self, begin: int, end: int) -> int:
        with suppress(FileNotFoundError), open_regular(self._metrics_path) as stream:
            stream.seek(begin)
            return zlib.crc32(stream.read(min(end - begin, _MARK_BYTES)))
        return zlib.crc32(b"")

    def _write_note(self) -> None:
        note = {
            **self._at,
            "mark": self._mark,
            "first": self._first,
            "system": self._system,
            "open": self._is_open,
        }
        write_whole(self.folder / _NOTE, json.dumps(note))


@dataclass(frozen=True)
class Waiting:
    """Number of undelivered items of a run's log."""

    points: int = 0
    files: int = 0
    status: str | None = None
    """The ending that MLflow does not know yet."""

    @classmethod
    def of(cls, run: Path) -> Waiting:
        """Count a run's."""
        points = files = 0
        status: str | None = None
        for reader in (earlier_spool.SpoolReader(run), OutboxReader(run)):
            for item in reader.waiting():
                points += item.points
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


def _is_cut(item: Item) -> bool:
    return item.kind in ("start", "rewind")


def _is_void(item: Item, cut: Item) -> bool:
    """Whether an item is of a checkpoint that the run has gone back before."""
    back_to = cut.values.get("back_to")
    return item.kind == "evaluation" and back_to is not None and item.values["step"] > back_to


def _whole(value: Any) -> int:
    """A whole number; -1 for anything else."""
    return value if type(value) is int else -1


def _byte(value: Any) -> int:
    return max(0, _whole(value)) if _whole(value) < _LARGEST else 0


def _lines(stream: BinaryIO, at: int) -> Iterator[tuple[int, Any, bytes]]:
    """(where it ends, what it says, itself) of each whole line; None for what is no JSON."""
    for line in lines_of(stream):
        if not line.endswith(b"\n"):
            return
        at += len(line)
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        yield at, values, line


def _points(record: Any) -> dict[str, float]:
    """A record's values for MLflow, by their fields' names."""
    if not isinstance(record, dict):
        return {}
    if "depth" in record:
        with suppress(ValueError, TypeError, KeyError):
            return DepthProfile.from_json(record).summary()
        return {}
    if "validation_loss" in record:  # the step's own record has the rest
        record = {
            name: value
            for name, value in record.items()
            if name == "validation_loss" or str(name).startswith("validation/")
        }
    found = {}
    for name, value in record.items():
        if name not in ("step", "time") and type(value) in (int, float):
            with suppress(OverflowError):
                found[name] = float(value)
    return found
