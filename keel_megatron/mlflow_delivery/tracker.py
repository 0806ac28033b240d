"""Everything that a run reports, behind one object; silent on every rank but 0."""

from __future__ import annotations

import os
import shlex
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TextIO

from keel_megatron.config.errors import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.depth.log import DepthLog
from keel_megatron.depth.profile import DEPTH_FILE, DepthProfile
from keel_megatron.mlflow_delivery.changes import Change
from keel_megatron.mlflow_delivery.sink import MlflowSink
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_file
from keel_megatron.mlflow_delivery.target import Status
from keel_megatron.tracking.metrics import MetricsFile, iterate_metrics
from keel_megatron.tracking.progress import Progress
from keel_megatron.tracking.records import CheckpointRecord, Record, ValidationRecord
from keel_megatron.urls import without_credentials


class Tracker:
    """Rank 0's: the progress, log.txt, metrics.jsonl, the depth profiles and MLflow.

    As a context manager it ends the MLflow run truly: FINISHED, KILLED after Ctrl-C, FAILED after
    any other error, which log.txt then has too.

    Args:
        config: the run.
        resume_step: step of the checkpoint that the run goes on from; None starts it anew.
        progress: where the run has spoken so far; None makes one on standard output.

    Raises:
        UserError: metrics.jsonl or depth.jsonl cannot be gone on with.
    """

    def __init__(
        self, config: RunConfig, resume_step: int | None, progress: Progress | None = None
    ) -> None:
        self._config = config
        self._closed = False
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            self._progress = progress or open_progress(config)
            undo.callback(self._progress.close)
            say = self._progress.say
            self._metrics = undo.enter_context(MetricsFile(folder / "metrics.jsonl", say))
            if resume_step is None:
                self._metrics.clear()
            else:
                self._metrics.rewind(resume_step)
            self._depth = undo.enter_context(DepthLog(folder, resume_step, say=say))
            self._progress.keep(folder / "log.txt")
            self._mlflow: MlflowSink | None = None
            if config.tracking.mlflow:
                # A group that its launcher starts again is the same run even without a checkpoint.
                back_to = 0 if resume_step is None and _started_again() else resume_step
                self._mlflow = MlflowSink(config, self._progress.say, back_to)
            undo.pop_all()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._config.training.folder

    def step(self, record: Record) -> None:
        """Report a step; a validation or a checkpoint is taken too."""
        if isinstance(record, ValidationRecord):
            self.validation(record)
            return
        if isinstance(record, CheckpointRecord):
            self.checkpoint(record)
            return
        self._write(record)
        self._progress.step(record)

    def validation(self, record: ValidationRecord) -> None:
        """Report a validation."""
        self._write(record)
        self._progress.validation(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Report a complete checkpoint."""
        self._write(record)

    def rewind(self, step: int) -> None:
        """Drop the records after `step`: the run goes on from there."""
        self._metrics.rewind(step)
        self._depth.rewind(step)
        if self._mlflow is not None:
            self._mlflow.rewind(step)

    def depth(self, profile: DepthProfile) -> None:
        """Report a depth profile; of what is not finite also say where it begins."""
        self._depth.write(profile)
        if self._mlflow is not None:
            self._mlflow.values(profile.step, profile.summary())
        alarm = profile.alarm()
        if alarm is not None:
            self._progress.say(alarm)

    def draw_depth(self, *, ending: bool) -> None:
        """Draw the depth profiles if it is time to (DepthLog.draw) and hand MLflow the pictures."""
        try:
            pictures = self._depth.draw(ending=ending)
        except Exception as error:  # whatever ails a picture, the run goes on
            self._progress.say(f"cannot draw the depth profiles: {type(error).__name__}: {error}")
            return
        for picture in pictures:
            self.artifact(picture)

    def say(self, text: str) -> None:
        """Show a message and keep it in log.txt."""
        self._progress.say(text)

    def artifact(self, path: Path) -> None:
        """Hand a file of the run's folder to MLflow."""
        if self._mlflow is not None:
            self._mlflow.artifact(path)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tag the MLflow run."""
        if self._mlflow is not None:
            self._mlflow.tags(tags)

    def changes(self, changes: Sequence[Change]) -> None:
        """Let MLflow have all changes of settings on the way to where the run stands."""
        if self._mlflow is not None:
            self._mlflow.changes(changes)

    def last_word(self, status: Status) -> None:
        """Leave how the run ends, for a process that is about to end itself; any thread may."""
        if self._mlflow is not None and not self._closed:
            self._mlflow.last_word(status)

    def where(self) -> list[str]:
        """Lines that say where the run's files and its dashboard are."""
        return where(self._config)

    def close(self, status: Status) -> None:
        """Deliver what is on its way and end the MLflow run with this status.

        The first call counts; later ones do nothing.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as ending:  # in reverse, each whatever becomes of the others
            ending.callback(self._progress.close)
            ending.callback(self._metrics.close)
            ending.callback(self._depth.close)
            if self._mlflow is not None:
                ending.callback(self._mlflow.finish, status)
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

    def _write(self, record: Record) -> None:
        self._metrics.write(record)
        if self._mlflow is not None:
            self._mlflow.record(record)

    def _note_end(self, error: BaseException | None) -> None:
        """Keep in log.txt what ended the run; standard error has it anyway."""
        if self._closed or error is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._progress.note("interrupted")
        elif isinstance(error, UserError):
            self._progress.note(f"error: {error}")
        else:
            self._progress.note("".join(traceback.format_exception(error)))


class NullTracker(Tracker):
    """A rank that does not report: takes everything, shows and writes nothing."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def step(self, record: Record) -> None:
        """Nothing."""

    def validation(self, record: ValidationRecord) -> None:
        """Nothing."""

    def checkpoint(self, record: CheckpointRecord) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def depth(self, profile: DepthProfile) -> None:
        """Nothing."""

    def draw_depth(self, *, ending: bool) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def artifact(self, path: Path) -> None:
        """Nothing."""

    def tags(self, tags: Mapping[str, str]) -> None:
        """Nothing."""

    def changes(self, changes: Sequence[Change]) -> None:
        """Nothing."""

    def last_word(self, status: Status) -> None:
        """Nothing."""

    def close(self, status: Status) -> None:
        """Nothing."""

    def _note_end(self, error: BaseException | None) -> None:
        """Nothing."""


def open_tracker(
    config: RunConfig, rank: int, resume_step: int | None, progress: Progress | None = None
) -> Tracker:
    """The tracker of a rank.

    Args:
        config: the run.
        rank: global rank; 0 reports.
        resume_step: step of the checkpoint that the run goes on from: later records of
            metrics.jsonl are dropped and the MLflow run goes on. None starts both anew.
        progress: where rank 0 has spoken so far; None makes one on standard output.
    """
    return Tracker(config, resume_step, progress) if rank == 0 else NullTracker(config)


def open_progress(config: RunConfig, stream: TextIO | None = None) -> Progress:
    """Where a run speaks before its folder is its own; its tracker keeps in log.txt what was said.

    Args:
        config: the run.
        stream: where progress is shown; standard output if None.
    """
    return Progress(config.training.steps, None, config.tracking.log_every, stream)


def check_records(folder: Path) -> None:
    """See that a run's metrics.jsonl and depth.jsonl can be gone on with.

    Raises:
        UserError: a line in the middle of one is no record.
    """
    for name in ("metrics.jsonl", DEPTH_FILE):
        for _record in iterate_metrics(folder / name):
            pass


def where(config: RunConfig) -> list[str]:
    """Lines that say where a run's files and its dashboard are."""
    folder = config.training.folder
    lines = [f"files      {folder}/ (metrics.jsonl, loss.png, log.txt, checkpoints/)"]
    if config.tracking.mlflow:
        uri = config.tracking.uri
        if uri is None or sqlite_file(uri) is not None:
            show = f"keel dashboard {shlex.quote(str(folder))}  (extra: dashboard)"
        elif uri.startswith(("http://", "https://", "databricks")):
            show = without_credentials(uri)
        else:
            shown = shlex.quote(without_credentials(uri))
            show = f"mlflow ui --backend-store-uri {shown}  (extra: dashboard)"
        lines.append(f"dashboard  {show}")
    return lines


def _started_again() -> bool:
    """Whether this is not the launcher's first start of the group."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
