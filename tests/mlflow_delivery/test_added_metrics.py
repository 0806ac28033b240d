"""Metrics of a checkpoint that another process than the training adds to its run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from keel_megatron.mlflow_delivery.presence import the_only_one
from keel_megatron.mlflow_delivery.run_file import take_run_file
from keel_megatron.mlflow_delivery.sync import add_metrics, sync
from keel_megatron.tracking.metrics import read_metrics
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs

NAME = "lm_eval/arc_easy/acc"


def points(run: object) -> list[tuple[int, float]]:
    return sorted(history(run, mlflow_runs(run)[-1].info.run_id, NAME))


def test_of_a_finished_run(tmp_path: Path) -> None:
    run = config(tmp_path)
    session = Session(run, "a")
    session.losses({1: 5.0, 2: 4.0})
    session.put("end", status="FINISHED")
    deliver(session.folder)
    records = read_metrics(session.folder / "metrics.jsonl")
    said = add_metrics(session.folder, 2, {NAME: 0.25, f"{NAME}_stderr": 0.01})
    assert "delivered 2 point(s) to MLflow" in said
    assert points(run) == [(2, 0.25)]
    assert mlflow_runs(run)[-1].info.status == "FINISHED"
    assert read_metrics(session.folder / "metrics.jsonl") == records


def test_a_resume_keeps_them_and_a_rebuild_has_them(tmp_path: Path) -> None:
    """Those of a step that the run went back before are of another model: they are left out."""
    run = config(tmp_path)
    first = Session(run, "a")
    first.losses({1: 5.0, 2: 4.0, 3: 3.0})
    first.put("evaluation", step=2, values={NAME: 0.25})
    first.put("evaluation", step=3, values={NAME: 0.5})
    first.put("end", status="FINISHED")
    second = Session(run, "b", back_to=2)
    second.losses({3: 3.5})
    second.put("end", status="FINISHED")
    add_metrics(first.folder, 3, {NAME: 0.75})
    assert points(run) == [(2, 0.25), (3, 0.75)]
    mlflow_client(run).delete_run(mlflow_runs(run)[0].info.run_id)
    sync(first.folder, rebuild=True)
    assert points(run) == [(2, 0.25), (3, 0.75)]


def test_while_the_run_is_training(tmp_path: Path) -> None:
    """Its worker delivers them."""
    run = config(tmp_path)
    session = Session(run, "a")
    deliver(session.folder)
    with the_only_one(session.folder, wait=True):
        said = add_metrics(session.folder, 4, {NAME: 0.25})
    assert said == (
        f"logged in {session.folder}, and not in MLflow yet: {session.folder}: the run is training "
        "and delivers its own reports"
    )
    deliver(session.folder)
    assert points(run) == [(4, 0.25)]


def test_where_nothing_can_be_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path)
    folder = run.training.folder
    folder.mkdir(parents=True)
    assert "because the run does not report to MLflow" in add_metrics(folder, 1, {NAME: 0.25})
    assert not (folder / "outbox").exists()
    session = Session(run, "a")
    take_run_file(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert f"because it is a copy of {folder}" in add_metrics(copy, 1, {NAME: 0.25})
    before = (folder / "outbox" / "events.jsonl").read_bytes()
    assert (copy / "outbox" / "events.jsonl").read_bytes() == before

    real = os.open

    def refuse(path: str, flags: int, *more: int, **others: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    said = add_metrics(session.folder, 1, {NAME: 0.25})
    assert said == f"{folder}: not logged, because {folder / 'outbox'} cannot be written"
