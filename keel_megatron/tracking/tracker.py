"""The interface through which a run reports."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from keel_megatron.errors import UserError
from keel_megatron.tracking.metrics import Recordable
from keel_megatron.tracking.outbox import relative
from keel_megatron.tracking.progress import Progress
from keel_megatron.tracking.records import (
    CheckpointRecord,
    DepthRecord,
    EvaluationRecord,
    Status,
    StepRecord,
    ValidationRecord,
)
from keel_megatron.tracking.run_log import RunLog


class Tracker:
    """Writes the run's log and shows its progress.

    As a context manager it logs the run's end: FINISHED, KILLED after Ctrl-C, or FAILED after any
    other error, which is also written to log.txt.

    Args:
        folder: the run's folder.
        log: the run's log; None: a rank that does not report, whose calls do nothing.
        progress: the console; None on a rank that does not report.
    """

    def __init__(self, folder: Path, log: RunLog | None, progress: Progress | None) -> None:
        self.folder = folder
        self._log = log
        self._progress = progress
        self._closed = False
        self._followers: list[Callable[[], None]] = []

    def at_end(self, finish: Callable[[], None]) -> None:
        """Register a function to call after the run's end is logged and before its files close."""
        self._followers.append(finish)

    def step(self, record: StepRecord | ValidationRecord | EvaluationRecord) -> None:
        """Report a step, a validation or an evaluation."""
        self._write(record)
        if self._progress is not None:
            if isinstance(record, ValidationRecord):
                self._progress.validation(record)
            elif isinstance(record, EvaluationRecord):
                self._progress.evaluation(record)
            else:
                self._progress.step(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Report a complete checkpoint."""
        self._write(record)

    def depth(self, profile: DepthRecord) -> None:
        """Report a depth profile, with a message if values are not finite."""
        self._write(profile)
        alarm = profile.alarm()
        if alarm is not None:
            self.say(alarm)

    def rewind(self, step: int) -> None:
        """Remove the records after `step`, from which the run resumes."""
        if self._log is not None:
            self._log.rewind(step)

    def say(self, text: str) -> None:
        """Show a message and write it to log.txt."""
        if self._progress is not None:
            self._progress.say(text)

    def artifact(self, path: Path) -> None:
        """Log a file of the run's folder for upload."""
        self._event("artifact", path=relative(self.folder, path))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Log tags of the run."""
        self._event("tags", tags=dict(tags))

    def changes(self, changes: Sequence[Recordable]) -> None:
        """Log all changes of settings so far."""
        self._event("changes", changes=[change.to_json() for change in changes])

    def last_word(self, status: Status) -> None:
        """Log the run's end from a process that is about to exit; thread-safe."""
        if not self._closed:
            self._event("end", status=status)

    def close(self, status: Status) -> None:
        """Log the end, call the functions of `at_end`, close the files.

        Only the first call has an effect.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as ending:  # in reverse order, each even if others fail
            if self._progress is not None:
                ending.callback(self._progress.close)
            if self._log is not None:
                ending.callback(self._log.close)
            for finish in reversed(self._followers):
                ending.callback(finish)
            ending.callback(self._event, "end", status=status)
            if self._progress is not None:
                ending.callback(self._progress.stop)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close("FINISHED")
            return
        self._note_end(error)
        self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _write(self, record: Recordable) -> None:
        if self._log is not None:
            self._log.write(record)

    def _event(self, kind: str, **values: object) -> None:
        if self._log is not None:
            self._log.event(kind, **values)

    def _note_end(self, error: BaseException | None) -> None:
        """Write the error that ended the run to log.txt; standard error has it too."""
        if self._closed or error is None or self._progress is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._progress.note("interrupted")
        elif isinstance(error, UserError):
            self._progress.note(f"error: {error}")
        else:
            self._progress.note("".join(traceback.format_exception(error)))
