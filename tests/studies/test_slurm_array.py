"""A study on a stand-in for SLURM that really runs its array: a node fails, and results come in.

sbatch starts the script once for each task, in the background and one after another; squeue lists
the array until its last task has ended.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.runtime.machines import this_machine
from tests.hosts import await_that
from tests.integration.commands import Completed, keel
from tests.launchers.test_launchers import ROOT
from tests.launchers.test_slurm import SCONTROL, SRUN
from tests.studies.test_grid import write

SBATCH = """#!/usr/bin/env bash
echo "$*" >>submitted
job=$((7000 + $(wc -l <submitted)))
echo "$job;cluster"
script=${!#}
[[ "$*" =~ --array=0-([0-9]+)% ]] && last=${BASH_REMATCH[1]}
eval "log=$(sed -n 's/^#SBATCH --output=//p' "$script")"
cp "$script" slurm_script
touch "queue/$job"
(
    export SLURM_JOB_NODELIST=node1 SLURM_JOB_NUM_NODES=1
    for ((task = 0; task <= last; task++)); do
        output=${log//%A/$job}
        SLURM_JOB_ID=$((job + task)) SLURM_ARRAY_TASK_ID=$task bash slurm_script \\
            >"${output//%a/$task}" 2>&1
    done
    rm "queue/$job"
) </dev/null >/dev/null 2>&1 &
"""
SQUEUE = """#!/usr/bin/env bash
ls "queue/${!#}" 2>/dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
NODE_FAILURE = """#!/usr/bin/env bash
if [[ -e down && $SLURM_ARRAY_TASK_ID == "$(cat down)" ]]; then
    echo "srun: error: Node failure on node1" >&2
    exit 143
fi
"""
STUDY = ("study", "depth-scaling", "run.yaml", "--rules", "keel", "--out", "out")
HOURS = 3600.0
"""No test of the machine's speed."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose commands find SLURM's; no array outlives the test."""
    for name in ("bin", "queue"):
        (tmp_path / name).mkdir()
    srun = NODE_FAILURE + SRUN.partition("\n")[2]
    commands = {"sbatch": SBATCH, "squeue": SQUEUE, "srun": srun, "scontrol": SCONTROL}
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "KEEL_PYTHON": sys.executable,
        "CALLS": str(tmp_path / "calls"),
        "NPROC_PER_NODE": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write(tmp_path, model__blocks=2, training__steps=3, training__global_batch_size=2)
    yield tmp_path
    await_end(tmp_path)


def await_end(cluster: Path) -> None:
    """Until nothing is in the queue."""
    await_that(lambda: not list((cluster / "queue").iterdir()), HOURS, "the end of the array")


def study(cluster: Path, *options: str) -> Completed:
    done = keel(cluster, *STUDY, *options, timeout=HOURS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def again(cluster: Path) -> Completed:
    """The same command, once nothing of the study is in the queue."""
    await_end(cluster)
    return study(cluster, "--rates", "1e-3,1e-2", "--executor", "slurm", "--sbatch=--nodes=1")


def results(cluster: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cluster / "out" / "results.json").read_text())
    return found


def test_an_array_trains_what_is_missing_and_a_failed_run_is_submitted_again(
    cluster: Path,
) -> None:
    """One of two runs has its result from this machine."""
    out = cluster / "out"
    study(cluster, "--rates", "1e-3", "--no-measure")
    (done,) = results(cluster)["rows"]
    trained = (out / done["run"] / "metrics.jsonl").read_bytes()
    (cluster / "down").write_text("0")
    assert "submitted 1 run as job 7001" in again(cluster).stdout
    (missing,) = results(cluster)["missing"]

    await_end(cluster)
    assert "Node failure" in (out / "logs" / "slurm-7001_0.log").read_text()
    (cluster / "down").unlink()
    assert "submitted 1 run as job 7002" in again(cluster).stdout
    assert results(cluster)["missing"] == [missing]

    last = again(cluster)
    assert "submitted" not in last.stdout
    found = results(cluster)
    assert [(row["run"], row["rate"], row["steps"]) for row in found["rows"]] == [
        (done["run"], 0.001, 3),
        (missing, 0.01, 3),
    ]
    assert (found["missing"], found["machines"]) == ([], {str(this_machine()): 2})
    assert "| 4 | keel | " in (out / "table.md").read_text()
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (out / done["run"] / "metrics.jsonl").read_bytes() == trained
    submitted = (cluster / "submitted").read_text().splitlines()
    assert submitted == ["--parsable --array=0-0%2 --nodes=1 out/slurm.sbatch"] * 2
