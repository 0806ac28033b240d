"""The log of a run: metrics.jsonl, and the events that belong to no step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from keel_megatron.tracking.metrics import MetricsFile, Recordable
from keel_megatron.tracking.outbox import EventLog

METRICS_FILE = "metrics.jsonl"
EARLIER_DEPTH_FILE = "depth.jsonl"
"""Where earlier versions kept the depth profiles, which are records of metrics.jsonl now."""


class RunLog:
    """Writes a run's log, each record once.

    A cut of metrics.jsonl is three steps in this order: the file is cut, an event says how many
    bytes stay, new records follow. A follower that reads the file depends on it (outbox.py).

    Args:
        folder: the run's folder.
        resume_step: records of later steps are dropped; None drops all.
        say: told when a file cannot be written, and when it can be again.
        start: what the start's event says beside the cut, plain JSON; None = the run has no
            followers and so no event log.

    Raises:
        UserError: metrics.jsonl cannot be continued.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        say: Callable[[str], None] = lambda _text: None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self._earlier = folder / EARLIER_DEPTH_FILE
        self._events = None if start is None else EventLog(folder)
        with ExitStack() as undo:
            self._metrics = undo.enter_context(MetricsFile(folder / METRICS_FILE, say))
            self._cut(resume_step, "start", start or {})
            undo.pop_all()

    def write(self, record: Recordable) -> None:
        """Append a record."""
        self._metrics.write(record)

    def event(self, kind: str, **values: Any) -> None:
        """Append an event, `values` being plain JSON; any thread may."""
        if self._events is not None:
            self._events.append(kind, **values)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`, which the run is about to compute again."""
        self._cut(step, "rewind", {"back_to": step})

    def close(self) -> None:
        """Close the files."""
        with ExitStack() as closing:
            closing.callback(self._metrics.close)
            if self._events is not None:
                closing.callback(self._events.close)

    @property
    def unwritten(self) -> int:
        """Events for which there was no room."""
        return 0 if self._events is None else self._events.unwritten

    def _cut(self, step: int | None, kind: str, values: Mapping[str, Any]) -> None:
        if self._earlier.is_file():
            with MetricsFile(self._earlier) as earlier:
                earlier.rewind(step)
        self._metrics.rewind(step, lambda size: self.event(kind, metrics=size, **values))
