"""`keel track sync`: one message for whatever a folder is."""

from __future__ import annotations

from pathlib import Path

from keel_megatron.mlflow_delivery.outbox import EVENTS, SpoolWriter
from keel_megatron.mlflow_delivery.target import Target
from tests.integration.commands import keel
from tests.tracking.samples import config


def test_a_run_s_spool_is_delivered_and_other_folders_are_named(tmp_path: Path) -> None:
    refused = keel(tmp_path, "track", "sync", ".")
    assert refused.returncode == 2
    assert refused.stderr == "error: . holds no run: there is no config.yaml in it\n"
    run = config(tmp_path)
    run.training.folder.mkdir()
    writer = SpoolWriter(run.training.folder, EVENTS)
    place = {"target": Target.of(run).to_json(), "host": "elsewhere", "pid": 1, "born": 0.0}
    writer.append("start", name="a", time=1000, **place)
    writer.append("metrics", step=1, time=2000, values={"loss": 5.0})
    done = keel(tmp_path, "track", "sync", "test")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("test: delivered 1 point(s) to MLflow (sqlite:///")
    assert second == (
        "test: its status is FAILED now: process 1 on elsewhere is gone and did not say how it "
        "ended"
    )
    assert "nothing waits" in keel(tmp_path, "track", "sync", "test").stdout
