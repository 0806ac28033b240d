"""The log of a run: metrics.jsonl, and events that belong to no step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from keel_megatron.tracking.metrics import MetricsFile, Recordable
from keel_megatron.tracking.outbox import EventLog

METRICS_FILE = "metrics.jsonl"
EARLIER_DEPTH_FILE = "depth.jsonl"
"""File of depth profiles of earlier versions; they are records of metrics.jsonl now."""


class RunLog:
    """Writes a run's log, each record once.

    metrics.jsonl is truncated in three steps, in this order: truncate the file, append an event
    with the remaining size, append new records. Readers depend on this order (outbox.py).

    Args:
        folder: the run's folder.
        resume_step: records of later steps are removed; None removes all.
        say: called when writing fails, and when it works again.
        start: further values of the start's event, JSON; None: no event log, because the run
            does not report to MLflow.

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
            self._truncate(resume_step, "start", start or {})
            undo.pop_all()

    def write(self, record: Recordable) -> None:
        """Append a record."""
        self._metrics.write(record)

    def event(self, kind: str, **values: Any) -> None:
        """Append an event; `values` must be JSON. Thread-safe."""
        if self._events is not None:
            self._events.append(kind, **values)

    def rewind(self, step: int) -> None:
        """Remove the records after `step`, which the run will compute again."""
        self._truncate(step, "rewind", {"back_to": step})

    def close(self) -> None:
        """Close the files."""
        with ExitStack() as closing:
            closing.callback(self._metrics.close)
            if self._events is not None:
                closing.callback(self._events.close)

    @property
    def unwritten(self) -> int:
        """Number of events lost because the disk was full."""
        return 0 if self._events is None else self._events.unwritten

    def _truncate(self, step: int | None, kind: str, values: Mapping[str, Any]) -> None:
        if self._earlier.is_file():
            with MetricsFile(self._earlier) as earlier:
                earlier.rewind(step)
        self._metrics.rewind(step, lambda size: self.event(kind, metrics=size, **values))
