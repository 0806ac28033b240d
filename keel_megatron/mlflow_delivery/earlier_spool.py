"""Reader of `spool/`, in which earlier versions kept undelivered reports.

    spool/events.000001.jsonl        starts, values, files, tags, changed settings, rewinds, endings
    spool/system-HOST.000001.jsonl   a node's own measurements
    spool/delivered.json             what is already delivered
    spool/target.json                the address of starts that do not name one

Nothing is written there any more. Files are deleted once they are delivered.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import lines_of, open_regular, parse_json
from keel_megatron.mlflow_delivery.items import Item, is_item, note_in, one_call
from keel_megatron.runtime.files import write_whole
from keel_megatron.tracking.outbox import segments

FOLDER = "spool"
_EVENTS = "events"
_NOTE = "delivered.json"
Place = tuple[int, int]
"""A file's number, and a byte in it."""


class SpoolReader:
    """The undelivered items of a spool.

    Values after the step to which a later start or rewind returns are skipped: the run computed
    them again.

    Args:
        run: the run's folder.

    Attributes:
        session: values of the last delivered start.
        last_start: values of the last start.
        ended: whether the last start has logged its end.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER
        note = note_in(self.folder / _NOTE)
        session = note.get("session")
        self.session: dict[str, Any] = session if isinstance(session, dict) else {}
        self._position: dict[str, Place] = {}
        with suppress(AttributeError, TypeError, ValueError):
            streams = note.get("streams", {}).items()
            self._position = {name: (int(number), int(byte)) for name, (number, byte) in streams}
        self._scanned = self._position.get(_EVENTS, (0, 0))
        self._turns: list[tuple[Place, int]] = []
        self.last_start: dict[str, Any] = dict(self.session)
        self.ended = not self.session.get("open", False)

    def scan(self) -> None:
        """Look ahead for starts, rewinds and ends."""
        for item in self._lines(_EVENTS, self._scanned):
            self._scanned = item.place
            if item.kind == "start":
                self.last_start, self.ended = item.values, False
            elif item.kind == "end":
                self.ended = True
            back_to = item.values.get("back_to")
            if back_to is not None:
                self._turns.append((item.place, back_to))

    def waiting(self) -> Iterator[Item]:
        """The items that are to be delivered: events first, in their order."""
        self.scan()
        for stream in self._streams():
            for item in self._lines(stream, self._position.get(stream, (0, 0))):
                if not self._is_overtaken(item):
                    yield item

    def batch(self) -> list[Item]:
        """The next items: values, as many as go into one call, or one of anything else."""
        return one_call(self.waiting())

    def commit(self, items: list[Item]) -> None:
        """Note that these are delivered (or given up), with all before them; delete their files."""
        for item in items:
            self._position[item.stream] = max(self._position.get(item.stream, (0, 0)), item.place)
            if item.kind == "start":
                self.session = {**item.values, "open": True}
            elif item.kind == "end":
                self.session["open"] = False
        self._turns = [t for t in self._turns if t[0] > self._position.get(_EVENTS, (0, 0))]
        self._write_note()
        self.tidy()

    def close(self) -> None:
        """Note that the last start's end is delivered, though the run did not say it."""
        self.session["open"], self.ended = False, True
        self._write_note()

    def tidy(self) -> None:
        """Delete the files that are delivered to their end."""
        for stream in self._streams():
            position = self._position.get(stream, (0, 0))
            for number, path in segments(self.folder, stream):
                if (number, path.stat().st_size) <= position:
                    path.unlink(missing_ok=True)

    def _write_note(self) -> None:
        note = {"streams": self._position, "session": self.session}
        write_whole(self.folder / _NOTE, json.dumps(note))

    def _streams(self) -> list[str]:
        names = {path.name.rsplit(".", 2)[0] for path in self.folder.glob("*.*.jsonl")}
        return sorted(names, key=lambda name: (name != _EVENTS, name))

    def _is_overtaken(self, item: Item) -> bool:
        if item.kind != "metrics":
            return False
        return any(
            place > item.place and item.values["step"] > back_to for place, back_to in self._turns
        )

    def _lines(self, stream: str, after: Place) -> Iterator[Item]:
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
                        if is_item(values):
                            yield Item(stream, (number, end), values)
