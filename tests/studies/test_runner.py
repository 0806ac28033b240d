"""Studies as a user runs them: real `keel train` processes, killed, resumed, failing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import yaml
from keel_megatron import config
from keel_megatron.checkpoint.folder import steps
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.machines import this_machine
from tests.integration.commands import Completed, keel, start
from tests.settings import settings

SIZE: dict[str, Any] = {
    "model__blocks": 2,
    "model__hidden_size": 32,
    "model__num_attention_heads": 2,
    "model__num_query_groups": 2,
    "training__steps": 40,
    "training__global_batch_size": 2,
    "checkpoint__every": 5,
}
STUDY = ("study", "alpha", "run.yaml", "--scale", "L", "--no-measure")
"""Three runs: alpha = L and its two variants."""
RUNS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    text = folder / "text.txt"
    sources = sorted(Path(config.__file__).parent.glob("*.py"))
    text.write_text("".join(path.read_text(encoding="utf-8") for path in sources))
    sections = settings(data__text=str(text), **SIZE)
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Completed:
    """The study at one go, with the dataset built by whichever of its runs is first."""
    return keel(place, *STUDY, "--measure", "--parallel", "2", "--out", "whole")


def rows(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["rows"]
    return found


def test_a_study_makes_results_a_table_and_a_picture(place: Path, whole: Completed) -> None:
    assert whole.returncode == 0, whole.stdout + whole.stderr
    out = place / "whole"
    found = rows(out)
    assert [row["variant"] for row in found] == ["", "first block v1", "no final norm"]
    assert all(row["steps"] == 40 and 0 < row["loss"] < 7 for row in found)
    assert all(row["validation_loss"] and row["tokens"] == 40 * 2 * 32 for row in found)
    assert len((out / "table.md").read_text().splitlines()) == 6 + RUNS
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "3 of 3 done" in (out / "study.log").read_text()
    assert "3 runs to do: about" in (out / "study.log").read_text()
    # One built the dataset, others of the same time waited.
    logs = "".join(log.read_text() for log in (out / "logs").iterdir())
    assert logs.count("training a tokenizer") == 1
    assert not (out / "owner.lock").exists()


def test_a_finished_study_repeats_nothing(place: Path, whole: Completed) -> None:
    """Not a run of a version that recorded no machines, either."""
    out = place / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    here = str(this_machine())
    assert json.loads((out / "results.json").read_text())["machines"] == {here: RUNS}
    (out / rows(out)[0]["run"] / "machines.json").unlink()
    again = keel(place, *STUDY, "--out", "whole")
    assert again.returncode == 0
    assert [row["machine"] for row in rows(out)] == ["not recorded", here, here]
    assert "3 of 3 runs have their results" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def children(process: Any) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def until(condition: Any, process: Any) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def begun(out: Path) -> set[str]:
    """Runs that have a checkpoint."""
    return {path.parent.name for path in out.glob("*/checkpoints") if steps(path.parent)}


def test_a_killed_grid_resumes_and_repeats_nothing(place: Path, whole: Completed) -> None:
    """Everything is killed at once with -9: nothing says goodbye."""
    out = place / "killed"
    with start(place, *STUDY, "--out", "killed") as study:
        until(lambda: list(out.glob("*/exit_code")) and len(begun(out)) > 1, study)
        for process in [*children(study), psutil.Process(study.pid)]:
            process.kill()
        study.wait(60)
    done = {path.parent.name: path.stat().st_mtime_ns for path in out.glob("*/exit_code")}
    assert 1 <= len(done) < RUNS
    resumed = begun(out) - done.keys()
    again = keel(place, *STUDY, "--out", "killed")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(done)} of 3 runs have their results" in again.stdout
    for name, written in done.items():
        assert (out / name / "exit_code").stat().st_mtime_ns == written
    for name in resumed:
        assert "resuming from" in (out / "logs" / f"{name}.txt").read_text()
    timed = ("step_seconds", "ended", "machine")
    plain = [
        [{key: value for key, value in row.items() if key not in timed} for row in rows(one)]
        for one in (out, place / "whole")
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_study_ends_its_runs(place: Path, whole: Completed, number: int) -> None:
    """By Ctrl-C it asks them; if it is killed, the kernel does. They save, and are its own only."""
    name = f"ended-{number}"
    out = place / name
    command = (*STUDY, "--out", name, "--parallel", "2", "training.steps=100000")
    with start(place, *command) as study:
        until(lambda: len(begun(out)) == 2, study)
        runs = children(study)
        second = keel(place, *command)
        assert second.returncode == exit_codes.USER_ERROR
        assert "is being studied by process" in second.stderr
        assert "another --out" in second.stderr
        os.kill(study.pid, number)
        said = study.communicate(timeout=120)[0]
    psutil.wait_procs(runs, timeout=120)
    assert not any(run.is_running() for run in runs)
    codes = [path.read_text().strip() for path in out.glob("*/exit_code")]
    assert codes == ["143", "143"]
    if number != signal.SIGKILL:
        assert study.returncode == 128 + number
        assert "stopped with 0 of 3 runs done; the same command resumes the rest" in said


def test_a_run_that_fails_does_not_end_the_study(place: Path, whole: Completed) -> None:
    """Its folder is taken by something that is no folder."""
    out = place / "failing"
    out.mkdir()
    names = [row["run"] for row in rows(place / "whole")]
    (out / names[1]).write_text("in the way")
    found = keel(place, *STUDY, "--out", "failing")
    assert found.returncode == exit_codes.FAILED
    assert f"{names[1]}: failed with code 2" in found.stdout
    assert f"1 of 3 runs have no result: {names[1]}" in found.stdout
    assert [row["run"] for row in rows(out)] == [names[0], names[2]]
    assert json.loads((out / "results.json").read_text())["missing"] == [names[1]]


def test_a_diverged_run_is_a_result(place: Path, whole: Completed) -> None:
    out = place / "diverged"
    rate = ("optimizer.learning_rate=1e30", "guard.limit=1", "optimizer.clip_grad=0")
    found = keel(place, *STUDY, "--out", "diverged", "--parallel", "2", *rate)
    assert found.returncode == 0, found.stdout
    assert all(row["diverged"] and row["loss"] is None for row in rows(out))
    assert "1 of 1 diverged" in (out / "table.md").read_text()
    again = keel(place, *STUDY, "--out", "diverged", *rate)
    assert "3 of 3 runs have their results" in again.stdout
