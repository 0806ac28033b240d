"""Opens a run's log, console and MLflow worker."""

from __future__ import annotations

import os
import shlex
import socket
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import psutil

from keel_megatron.config.run import RunConfig
from keel_megatron.depth.drawing import draw_profiles
from keel_megatron.mlflow_delivery.process import WorkerProcess
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_file
from keel_megatron.mlflow_delivery.target import Target, tracking_uri
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.progress import Progress
from keel_megatron.tracking.run_log import EARLIER_DEPTH_FILE, METRICS_FILE, RunLog
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.urls import without_credentials


def open_tracker(
    config: RunConfig, rank: int, resume_step: int | None, progress: Progress | None = None
) -> Tracker:
    """The tracker of a rank; on rank 0 it logs the start and starts the MLflow worker.

    Args:
        config: the run.
        rank: global rank; 0 reports.
        resume_step: step of the checkpoint that the run resumes from: later records of
            metrics.jsonl are dropped and the MLflow run continues. None starts both anew.
        progress: rank 0's progress display so far; None creates one on standard output.

    Raises:
        UserError: metrics.jsonl cannot be continued.
    """
    folder = config.training.folder
    if rank != 0:
        return Tracker(folder, None, None)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        progress = progress or open_progress(config)
        undo.callback(progress.close)
        # A process group that its launcher restarts is the same run even without a checkpoint.
        back_to = 0 if resume_step is None and _started_again() else resume_step
        start = start_event(config, back_to) if config.tracking.mlflow else None
        log = RunLog(folder, resume_step, progress.say, start)
        undo.callback(log.close)
        progress.keep(folder / "log.txt")
        tracker = Tracker(folder, log, progress)
        tracker.at_end(_ending(config, log, start, progress.say))
        undo.pop_all()
    return tracker


def start_event(config: RunConfig, back_to: int | None = None) -> dict[str, Any]:
    """Values of a start's event: the MLflow run, and the process whose end it follows.

    Args:
        config: the run.
        back_to: step that the run resumes from, in the folder's MLflow run; None begins a new one.
    """
    return {
        "target": Target.of(config).to_json(),
        "name": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        **({} if back_to is None else {"back_to": back_to}),
    }


def _ending(
    config: RunConfig, log: RunLog, start: dict[str, Any] | None, say: Callable[[str], None]
) -> Callable[[], None]:
    """Start the MLflow worker; the function that waits for it at the run's end.

    The MLflow worker also draws the depth profiles. Without a worker, rank 0 draws them after
    training.
    """
    folder, to = config.training.folder, config.tracking.uri
    if start is None:
        return lambda: _draw(config, say)
    process = WorkerProcess(folder, start["name"], tracking_uri(config), to, say)

    def end() -> None:
        """Wait for the worker, report what it could not be told, and draw in its place."""
        process.finish()
        if log.unwritten:
            say(
                f"MLflow did not receive {log.unwritten} event(s) of the run log, because the disk "
                f"of {folder} was full"
            )
        if process.is_unusable:
            _draw(config, say)

    return end


def _draw(config: RunConfig, say: Callable[[str], None]) -> None:
    if config.tracking.depth_every == 0:
        return
    try:
        draw_profiles(config.training.folder)
    except Exception as error:  # a failed picture does not change the run's end
        say(f"cannot draw the depth profiles: {type(error).__name__}: {error}")


def open_progress(config: RunConfig, stream: TextIO | None = None) -> Progress:
    """The progress display of a start; the tracker later adds its messages to log.txt.

    Args:
        config: the run.
        stream: where progress is shown; standard output if None.
    """
    return Progress(
        config.training.steps, None, config.tracking.log_every, stream, sizes=config.batch_sizes
    )


def check_records(folder: Path) -> None:
    """Check that metrics.jsonl, and an earlier version's depth.jsonl, can be continued.

    Raises:
        UserError: a line in the middle of one is not a record.
    """
    for name in (METRICS_FILE, EARLIER_DEPTH_FILE):
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
    lines.append(f"generate   keel generate {shlex.quote(str(folder))} --prompt TEXT")
    return lines


def _started_again() -> bool:
    """Whether the launcher has restarted the process group."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
