"""Reports a study to MLflow, as the parent of its runs; what cannot be delivered waits."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.mlflow_delivery.study import StudyLog
from keel_megatron.mlflow_delivery.tags import code_tags
from keel_megatron.mlflow_delivery.target import sync_command
from keel_megatron.runtime.interpreter import environment, python
from keel_megatron.studies.grid import Grid
from keel_megatron.studies.results import PICTURE, RESULTS, TABLE
from keel_megatron.tracking.records import Status


@dataclass
class Report:
    """What the study's MLflow run is told at the end."""

    status: Status = "FAILED"


@contextmanager
def reported(grid: Grid, say: Callable[[str], None]) -> Iterator[Report]:
    """Report the study's start, and its end with the results, if its runs report to MLflow.

    The start is delivered before the block, because the runs are shown under it.

    Args:
        grid: the study's runs.
        say: called with what cannot be delivered.
    """
    config = grid.runs[0].config
    report = Report()
    if not config.tracking.mlflow:
        yield report
        return
    params = {
        "study": grid.study.name,
        "config": str(grid.runs[0].path),
        "points": str(len(grid.study.points)),
        "runs": str(len(grid.runs)),
    }
    try:
        log = StudyLog(grid.study.name, grid.out, config, params)
    except OSError as error:
        say(f"the study is not reported to MLflow: {error.filename}: {error.strerror}")
        yield report
        return
    log.tags(code_tags())
    uri = config.tracking.uri
    _deliver(log.folder, uri, say)
    try:
        yield report
    finally:
        files = [grid.out / name for name in (RESULTS, TABLE, PICTURE)]
        try:
            log.end(report.status, [path for path in files if path.is_file()])
        except OSError as error:
            say(f"the results are not reported to MLflow: {error.filename}: {error.strerror}")
        _deliver(log.folder, uri, say)


def _deliver(folder: Path, uri: str | None, say: Callable[[str], None]) -> None:
    """Deliver the log in a process of its own: MLflow's import takes seconds and starts threads."""
    to = ["--to", uri] if uri else []
    command = [*python(), "-m", "keel_megatron", "track", "sync", *to, str(folder)]
    with (folder / "sync.txt").open("w+b") as output:
        process = subprocess.Popen(
            command, env=environment(), stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        if process.wait():
            output.seek(0)
            lines = output.read().decode("utf-8", "replace").splitlines()
            why = lines[-1] if lines else "it failed"
            say(f"the study is not in MLflow yet: {why} ({sync_command(folder, uri)})")
