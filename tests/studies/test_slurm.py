"""`--executor slurm` with stand-ins for sbatch and squeue; the script is a real one."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from keel_megatron.config.bundled import locate
from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes
from keel_megatron.studies.grid import Grid, Point, make_grid
from keel_megatron.studies.slurm import run_on_slurm, script_text
from tests.launchers.test_launchers import ROOT
from tests.studies.test_grid import study, write

SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$CALLS"
echo "7;cluster"
"""
SQUEUE = """#!/usr/bin/env bash
[[ "$*" == "--noheader --jobs 7" ]] && cat "$QUEUE" 2>/dev/null && exit
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.chdir(tmp_path)
    points = [Point(name, {"model.alpha": number}, {}) for number, name in enumerate("abc", 1)]
    one = study(*points)
    return make_grid(one, write(tmp_path), ["training.threads=0"], Path("out"), parallel=0)


def submit(grid: Grid) -> tuple[list[str], str]:
    said: list[str] = []
    return run_on_slurm(grid, 2, ["--nodes=1"], said.append), "\n".join(said)


def test_an_array_has_a_task_for_each_run(grid: Grid, tmp_path: Path) -> None:
    left, said = submit(grid)
    assert left == [run.name for run in grid.runs]
    assert "submitted 3 runs as job 7, 2 at a time" in said
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["--parsable", "--array=0-2%2", "--nodes=1", "out/slurm.sbatch"]
    script = (tmp_path / "out" / "slurm.sbatch").read_text()
    for line in ("--signal=B:USR1@600", "--requeue", "--job-name=keel-test"):
        assert f"#SBATCH {line}\n" in script
    assert script.count("--job-name") == 1


@pytest.mark.parametrize("task", [0, 2])
def test_a_task_trains_its_run_as_the_launcher_does(grid: Grid, tmp_path: Path, task: int) -> None:
    """Up to the command that the launcher shows."""
    submit(grid)
    script = (tmp_path / "out" / "slurm.sbatch").read_text()
    shown = script.replace('slurm.sbatch" "$@"', 'slurm.sbatch" --dry-run "$@"')
    assert shown != script
    env = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", shown], cwd="/", env=env, capture_output=True, text=True, check=True
    )
    command = shlex.split(done.stdout.splitlines()[0])
    assert command[-len(grid.runs[task].settings) :] == list(grid.runs[task].settings)
    assert f"training.name={grid.runs[task].name}" in done.stdout
    assert "training.threads=0" in done.stdout


def test_the_same_command_waits_then_submits_what_is_left(grid: Grid, tmp_path: Path) -> None:
    submit(grid)
    (tmp_path / "calls").unlink()
    (tmp_path / "queue").write_text("7_1 batch keel R 1:00\n")
    left, said = submit(grid)
    assert len(left) == 3
    assert "job 7 is still in the queue" in said
    assert not (tmp_path / "calls").exists()

    (tmp_path / "queue").unlink()  # SLURM has forgotten it
    for run, code in zip(grid.runs, (exit_codes.DONE, exit_codes.DIVERGED), strict=False):
        run.folder.mkdir(parents=True)
        exit_codes.write(run.folder, code)
    left, said = submit(grid)
    assert left == [grid.runs[2].name]
    assert "--array=0-0%2" in (tmp_path / "calls").read_text()
    exit_codes.write(grid.runs[1].folder, exit_codes.DONE)
    grid.runs[2].folder.mkdir()
    exit_codes.write(grid.runs[2].folder, exit_codes.DONE)
    assert submit(grid) == ([], "")


def test_while_slurm_does_not_answer_nothing_is_submitted(grid: Grid, tmp_path: Path) -> None:
    submit(grid)
    (tmp_path / "calls").unlink()
    squeue = "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n"
    (tmp_path / "bin" / "squeue").write_text(squeue)
    with pytest.raises(UserError, match="squeue: Unable to contact slurm controller; try again"):
        submit(grid)
    assert not (tmp_path / "calls").exists()


def test_a_script_has_the_bundled_file_and_quotes_the_logs_folder(
    grid: Grid, tmp_path: Path
) -> None:
    named = tuple(replace(run, path=Path("studies/quick")) for run in grid.runs)
    text = script_text(replace(grid, out=Path("100% of it"), runs=named), named, ROOT)
    assert f"0) set -- {shlex.quote(str(locate(Path('studies/quick'))))} " in text
    logs = f"{tmp_path}/100%% of it/logs"
    assert f'#SBATCH --output="{logs}/slurm-%A_%a.log"\n' in text


def test_without_sbatch_nothing_is_written(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="there is no sbatch in PATH"):
        submit(grid)
    assert not (tmp_path / "out").exists()
