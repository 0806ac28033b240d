"""Which database is served, and what is delivered to it first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config.load import dump_config
from keel_megatron.dashboard.shown import choose, fill
from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.presence import the_only_one
from tests.mlflow_delivery.session import Session
from tests.tracking.samples import config, mlflow_runs


def started(tmp_path: Path, name: str, **overrides: Any) -> Any:
    """A run whose start and a step wait to be delivered."""
    run = config(tmp_path, training__name=name, **overrides)
    session = Session(run, name)
    session.losses({1: 5.0})
    session.put("end", status="FINISHED")
    (session.folder / "config.yaml").write_text(dump_config(run))
    return run


def test_one_database_is_shown_and_other_runs_are_named(tmp_path: Path) -> None:
    first = started(tmp_path / "runs", "first")
    second = started(tmp_path / "runs", "second")
    apart = started(tmp_path / "apart", "apart")
    remote = started(tmp_path / "runs", "remote", tracking__uri="https://me@host/")
    silent = started(tmp_path / "runs", "silent", tracking__mlflow=False)
    runs = [each.training.folder for each in (first, second, apart, remote, silent)]
    shown = choose(runs)
    assert (shown.database, shown.runs) == (tmp_path / "runs" / "mlflow.db", runs[:2])
    assert shown.foreign is None
    assert shown.others == [
        f"apart reports to {tmp_path}/apart/mlflow.db: `keel dashboard {runs[2]}` shows it",
        "remote reports to https://***@host/: look there",
        "silent does not report to MLflow: tracking.mlflow is false",
    ]
    with pytest.raises(UserError, match="none of these runs reports to a local database; remote"):
        choose(runs[3:])


def test_what_waits_is_delivered_but_not_to_an_address_or_twice(tmp_path: Path) -> None:
    quiet, busy = started(tmp_path, "quiet"), started(tmp_path, "busy")
    remote = started(tmp_path, "remote", tracking__uri="http://127.0.0.1:9")
    said: list[str] = []
    with the_only_one(busy.training.folder, wait=False):  # as its worker does
        fill([run.training.folder for run in (quiet, busy, remote)], said.append)
    assert [run.info.run_name for run in mlflow_runs(quiet)] == ["quiet"]
    assert said == []


@pytest.mark.security
def test_somebody_else_s_runs_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(tmp_path, "theirs")
    folder = run.training.folder
    (folder / "mlflow.db").write_bytes(b"an earlier version's")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    fill([folder], [].append)
    shown = choose([folder])
    assert shown.foreign == f"belongs to another user (id {os.getuid()})"
    (tmp_path / "mlflow.db").rename(tmp_path / "moved.db")
    assert choose([folder]).foreign == "belongs to another user"
    (tmp_path / "moved.db").rename(tmp_path / "mlflow.db")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
