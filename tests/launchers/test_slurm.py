"""launchers/slurm.sbatch with stand-ins for SLURM that start the real thing as two nodes here.

The signal before the time limit makes the run save, the job goes back into the queue, and its
second start ends the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.hosts import await_that
from tests.integration.commands import environment, keel, losses_of, write_config
from tests.launchers.test_launchers import ROOT
from tests.ports import reserved_port

# One task a node, each told its number; SIGUSR1 handed to the tasks; the largest exit code.
SRUN = """#!/usr/bin/env bash
while [[ $1 != bash ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
    code=0
    wait "$task" || code=$?
    while kill -0 "$task" 2>/dev/null; do code=0; wait "$task" || code=$?; done
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [[ $1 == show ]]; then for ((n = 0; n < 5000; n++)); do echo localhost; done; fi
"""


def submit(folder: Path, job: int, restarts: int, steps: int) -> subprocess.Popen[str]:
    """What SLURM does with the batch script: run it on the first node."""
    env = environment() | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "KEEL_PYTHON": sys.executable,
        "KEEL_ROOT": str(ROOT),
        "CALLS": str(folder / "calls"),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_RESTART_COUNT": str(restarts),
        "NPROC_PER_NODE": "1",
    }
    copy = folder / "slurm_script"  # as SLURM runs it
    copy.write_text((ROOT / "launchers" / "slurm.sbatch").read_text())
    # Both "nodes" have this machine's name, which the pre-flight would refuse.
    settings = [f"training.steps={steps}", "parallel.pipeline=2", "parallel.preflight=never"]
    return subprocess.Popen(
        ["bash", str(copy), "run.yaml", *settings],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_job_saves_before_its_limit_and_is_requeued_until_done(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    write_config(tmp_path, Path(argparse.__file__), training__validation_sequences=4)
    built = keel(tmp_path, "data", "build", "run.yaml")  # several machines build none
    assert built.returncode == 0, built.stderr
    metrics = tmp_path / "runs" / "test" / "metrics.jsonl"
    with reserved_port() as port:
        _saves_and_is_requeued(tmp_path, port - 20_000, metrics)


def _saves_and_is_requeued(tmp_path: Path, job: int, metrics: Path) -> None:
    requeue = f"requeue {job}\n"
    first = submit(tmp_path, job, 0, 100_000)  # the signal comes before its end for sure
    try:
        await_that(
            lambda: first.poll() is not None or (metrics.is_file() and len(losses_of(metrics)) > 2),
            300,
            "step 3",
        )
        first.send_signal(signal.SIGUSR1)  # --signal=B:USR1@600
        out, _ = first.communicate(timeout=300)
    finally:
        end(first)
    assert first.returncode == 75, out
    assert "SIGUSR1: handing it to the trainers" in out
    assert "checkpoint written; the same command resumes from there" in out
    assert f"saved: job {job} goes back into the queue" in out
    assert (tmp_path / "calls").read_text().endswith(requeue)
    saved = len(losses_of(metrics))
    steps = saved + 6

    second = submit(tmp_path, job, 1, steps)
    try:
        out, _ = second.communicate(timeout=300)
    finally:
        end(second)
    assert second.returncode == 0, out
    assert f"resuming from runs/test/checkpoints/step_{saved:08d}" in out
    assert [step for step, _loss, _norm in losses_of(metrics)] == list(range(1, steps + 1))
    assert (tmp_path / "calls").read_text().count(requeue) == 1


def test_sigterm_to_the_batch_script_is_handed_on(tmp_path: Path) -> None:
    """With a stand-in for the whole of a node: it says which signal it got."""
    node = "trap 'echo got TERM; exit 143' TERM; touch ready; while true; do sleep 0.05; done"
    for name, text in (("srun", f"#!/usr/bin/env bash\n{node}\n"), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    write_config(tmp_path, Path(argparse.__file__))
    batch = submit(tmp_path, 1, 0, 9)
    try:
        await_that((tmp_path / "ready").is_file, 300, "the job's step")
        batch.send_signal(signal.SIGTERM)
        out, _ = batch.communicate(timeout=300)
    finally:
        end(batch)
    assert batch.returncode == 143, out
    assert "SIGTERM: the run is to save and end" in out
    assert "got TERM" in out
    assert "requeue" not in (tmp_path / "calls").read_text()


def end(batch: subprocess.Popen[str]) -> None:
    """Whatever became of the test, nothing of the job is left running."""
    if batch.poll() is None:
        os.killpg(batch.pid, signal.SIGTERM)
        batch.wait(300)
