"""Machines and tags: from every node, under MLflow's names."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.mlflow_delivery import tags
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader
from keel_megatron.mlflow_delivery.system import Machine, measured_machine, node_name
from tests.hosts import await_that
from tests.tracking.samples import config


@pytest.mark.parametrize(
    ("local_rank", "settings", "measures"),
    [
        (0, {}, True),
        (1, {}, False),
        (0, {"tracking__system_metrics_every": 0.0}, False),
        (0, {"tracking__mlflow": False}, False),
    ],
)
def test_one_process_a_node_measures(
    tmp_path: Path, local_rank: int, settings: dict[str, Any], measures: bool
) -> None:
    run = config(tmp_path, **({"tracking__system_metrics_every": 0.02} | settings))
    reader = OutboxReader(run.training.folder)
    with measured_machine(run, local_rank):
        threads = {thread.name for thread in threading.enumerate()}
        assert ("system metrics" in threads) == measures
        if measures:
            await_that(lambda: len(list(reader.waiting())) > 1, 300, "two measurements")
    if not measures:
        assert not run.training.folder.exists()
        return
    values = list(reader.waiting())[1].values["values"]
    name = f"system/{node_name()}/"
    assert all(key.startswith(name) for key in values)
    assert 0 < values[name + "system_memory_usage_percentage"] < 100
    assert 0 <= values[name + "cpu_utilization_percentage"] <= 100


def test_the_names_are_mlflows_own() -> None:
    """Its user interface groups what has these names."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= monitor.aggregate_metrics().keys()
    assert Machine().measure().keys() <= theirs


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("KEEL_GIT_COMMIT", raising=False)
    git("init", "-q")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-qm", "a")
    package = tmp_path / "venv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert tags.git_commit(package) is None, "another's repository says nothing of the package"
    monkeypatch.setenv("KEEL_GIT_COMMIT", "abc")
    assert tags.git_commit(package) == ("abc", "unknown")
    git("add", "venv")
    git("commit", "-qm", "b")
    assert tags.git_commit(package) == (git("rev-parse", "HEAD"), "false")
    (package / "__init__.py").write_text("x = 1")
    assert tags.git_commit(package) == (git("rev-parse", "HEAD"), "true")


def test_hosts_are_bounded_and_named_once() -> None:
    place = tags.place_tags("TP 1", "H200", ["a", "a", "b", "b"])
    assert (place["hosts"], place["nodes"], place["world_size"]) == ("a, b", "2", "4")
    many = tags.place_tags("TP 1", "H200", [f"node-{n:05d}" for n in range(1000)])
    assert len(many["hosts"]) < 1100
    assert many["hosts"].endswith("(1000 in all)")


def test_the_launchers_job_is_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEEL_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "job.id" not in tags.code_tags()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
    assert tags.job_id() == "17"
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert tags.code_tags()["job.id"] == "4711"
    assert tags.code_tags()["version.megatron-core"] == "0.16.1"
