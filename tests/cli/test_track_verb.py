"""`keel track sync`: one message for whatever a folder is."""

from __future__ import annotations

from pathlib import Path

from tests.integration.commands import keel
from tests.mlflow_delivery.session import Session
from tests.tracking.samples import config


def test_a_run_s_log_is_delivered_and_other_folders_are_named(tmp_path: Path) -> None:
    refused = keel(tmp_path, "track", "sync", ".")
    assert refused.returncode == 2
    assert refused.stderr == "error: . contains no run: there is no config.yaml in it\n"
    run = config(tmp_path)
    Session(run, "a", host="elsewhere").losses({1: 5.0})
    done = keel(tmp_path, "track", "sync", "test")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("test: delivered 1 point(s) to MLflow (sqlite:///")
    assert second == (
        "test: its status is FAILED now: process 0 on elsewhere is gone and did not say how it "
        "ended"
    )
    assert "nothing to deliver" in keel(tmp_path, "track", "sync", "test").stdout
    again = keel(tmp_path, "track", "sync", "test", "--rebuild").stdout
    assert again.startswith("test: delivered 1 point(s) again to MLflow (sqlite:///")
