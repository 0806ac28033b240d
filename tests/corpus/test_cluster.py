"""Builds on SLURM, with a stand-in that runs the submitted commands here; and on Ray."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import yaml
from keel_megatron.cli.main import app
from keel_megatron.config.data import DataConfig
from keel_megatron.corpus import cluster, plan
from keel_megatron.corpus.build import build, identify, partial_of
from keel_megatron.corpus.cluster import jobs_of_task, run_task
from keel_megatron.corpus.finish import unfinished
from keel_megatron.corpus.plan import Plan, read_plan
from keel_megatron.corpus.progress import BuildProgress
from keel_megatron.data.manifest import Manifest
from keel_megatron.errors import UserError
from tests.corpus.datasets import built, documents, write_texts
from tests.corpus.files import data, ignore
from tests.corpus.tokenizers import write_sentencepiece
from tests.settings import settings

ROOT = Path(__file__).resolve().parents[2]

# Keeps each submitted job's arguments; prints its number, as --parsable does.
SBATCH = """#!/usr/bin/env bash
number=$((100 + $(ls "$SUBMITTED" | wc -l)))
printf '%s\\0' "$@" >"$SUBMITTED/$number"
echo "$number;cluster"
"""
# Jobs of which the folder has a file are in the queue.
SQUEUE = """#!/usr/bin/env bash
ls "$QUEUE/${!#}" 2>/dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the jobs that the stand-in was given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "submitted").mkdir()
    (tmp_path / "queue").mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "submitted"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(plan, "SMALLEST_JOB", 3000)
    monkeypatch.setattr(plan, "COST_OF_FILE", 0)
    return data(
        text=str(write_texts(tmp_path / "text", 20)),
        tokenizer=str(write_sentencepiece(tmp_path)),
        vocab_size=400,
        cache_dir=str(tmp_path / "cache"),
    )


def arguments(job: Path) -> dict[str, str]:
    """The options of a submitted job."""
    words = [word for word in job.read_text().split("\0") if word]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def run_job(job: Path, task: int | None = None) -> None:
    """What SLURM does with a job."""
    numbers = {} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}
    command = arguments(job)["wrap"]
    subprocess.run(["sh", "-c", command], check=True, env={**os.environ, **numbers}, cwd=ROOT)


def test_the_build_of_an_array_of_jobs(tmp_path: Path, submitted: Path, config: DataConfig) -> None:
    folder = tmp_path / "d"
    content = settings() | {"data": config.model_dump(mode="json", exclude_none=True)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    options = ["--tasks", "2", "--workers", "3", "--sbatch", "--partition=cpu"]
    command = ["data", "build", str(tmp_path / "run.yaml"), "--out", str(folder)]
    shown = CliRunner().invoke(app, [*command, "--executor", "slurm", *options])
    assert shown.exit_code == 0, shown.output
    partial = partial_of(folder)
    assert "submitted 2 tasks as job 100, and job 101, which finishes" in shown.stdout
    array, finish = arguments(submitted / "100"), arguments(submitted / "101")
    assert (array["array"], array["cpus-per-task"], array["partition"]) == ("0-1", "3", "cpu")
    assert array["wrap"].startswith(
        f"{shlex.quote(sys.executable)} -P -m keel_megatron data task {partial}"
    )
    assert finish["dependency"] == "afterany:100"
    for task in range(2):
        run_job(submitted / "100", task)
    assert unfinished(partial, read_plan(partial)) == []
    run_job(submitted / "101")
    names = {path.name for path in folder.iterdir()}
    assert names == {"build.log", "data.json", "shards", "sources.json", "tokenizer.model"}
    built(config, tmp_path / "here")
    assert documents(folder) == documents(tmp_path / "here")


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no sbatch in PATH"):  # before any work
        cluster.slurm(tasks=2, workers=1, again=[])


def test_sbatch_refuses(tmp_path: Path, config: DataConfig, submitted: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'Invalid partition' >&2\nexit 1\n")
    execute = cluster.slurm(tasks=2, workers=1, again=[])
    with pytest.raises(UserError, match=r"sbatch failed: Invalid partition"):
        build(config, identify(config, ignore), tmp_path / "d", ignore, execute)


@pytest.mark.parametrize("waiting", ["100", "101"])
def test_the_same_command_does_not_submit_twice(
    tmp_path: Path, config: DataConfig, submitted: Path, waiting: str
) -> None:
    folder, found = tmp_path / "100% of it", identify(config, ignore)
    execute = cluster.slurm(tasks=2, workers=1, again=[])

    def submit() -> Manifest | None:
        return build(config, found, folder, ignore, execute)

    assert submit() is None
    partial = f"{tmp_path}/100%% of it.partial"
    assert arguments(submitted / "100")["output"] == f"{partial}/jobs/slurm-%A_%a.log"
    assert arguments(submitted / "101")["output"] == f"{tmp_path}/slurm-%j.log"
    (tmp_path / "queue" / waiting).touch()
    with pytest.raises(UserError, match=f"job {waiting} of this build is still in the queue"):
        submit()
    (tmp_path / "queue" / "101").touch()
    with pytest.raises(UserError, match="scancel 100 101" if waiting == "100" else "scancel 101"):
        submit()
    for job in (tmp_path / "queue").iterdir():
        job.unlink()
    assert submit() is None
    assert len(list(submitted.iterdir())) == 4
    for task in range(2):
        run_task(partial_of(folder), task, 2, 1, ignore)
    assert submit() is not None  # nothing is left to submit
    assert len(list(submitted.iterdir())) == 4
    assert not (folder / "jobs").exists()


def test_the_array_is_remembered_where_the_second_job_is_refused(
    tmp_path: Path, config: DataConfig, submitted: Path
) -> None:
    refusal = "[[ $* != *dependency* ]] || exit 1\n"
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.replace("\n", f"\n{refusal}", 1))
    execute = cluster.slurm(tasks=2, workers=1, again=[])
    with pytest.raises(UserError, match="sbatch failed"):
        build(config, identify(config, ignore), tmp_path / "d", ignore, execute)
    (tmp_path / "queue" / "100").touch()
    with pytest.raises(UserError, match="job 100 of this build is still in the queue"):
        build(config, identify(config, ignore), tmp_path / "d", ignore, execute)


def test_every_job_is_in_one_task(tmp_path: Path, config: DataConfig) -> None:
    def check(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        for tasks in (1, 2, 3, 7, 100):
            parts = [jobs_of_task(plan, task, tasks) for task in range(tasks)]
            assert [job for part in parts for job in part] == list(plan.jobs)

    build(config, identify(config, ignore), tmp_path / "d", ignore, check)


def test_mistaken_tasks(tmp_path: Path, config: DataConfig) -> None:
    with pytest.raises(UserError, match=r"is not the .partial folder of a build in progress"):
        run_task(tmp_path, 0, 1, 1, ignore)
    build(config, identify(config, ignore), tmp_path / "d", ignore, lambda *_: None)
    with pytest.raises(UserError, match=r"--task: 2 must be from 0 to 1"):
        run_task(tmp_path / "d.partial", 2, 2, 1, ignore)


def test_ray_without_datatrove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(UserError, match=r"pip install 'keel-megatron\[data-cluster\]'"):
        cluster.ray(tasks=2, workers=1)


def test_datatrove_runs_the_tasks(tmp_path: Path, config: DataConfig) -> None:
    pytest.importorskip("datatrove")
    from datatrove.executor.local import LocalPipelineExecutor

    from keel_megatron.corpus.datatrove_step import BuildStep

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        LocalPipelineExecutor(
            pipeline=[BuildStep(str(partial))],
            tasks=3,
            workers=1,
            logging_dir=str(tmp_path / "logs"),
        ).run()

    folder = tmp_path / "d"
    assert build(config, identify(config, ignore), folder, ignore, execute) is not None
    built(config, tmp_path / "here")
    assert documents(folder) == documents(tmp_path / "here")


@pytest.mark.parametrize("file", ["d.partial/jobs/text-00001.bin", None])
def test_a_task_on_a_full_disk(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    def full(*_arguments: object) -> None:
        reason = os.strerror(errno.ENOSPC)
        raise OSError(errno.ENOSPC, reason, *([str(tmp_path / file)] if file else []))

    build(config, identify(config, ignore), tmp_path / "d", ignore, lambda *_: None)
    monkeypatch.setattr(cluster, "run_jobs", full)
    why = rf"^cannot write {tmp_path / (file or 'd.partial')}: No space left on device"
    with pytest.raises(UserError, match=why):
        run_task(tmp_path / "d.partial", 0, 1, 1, ignore)
