"""Whole runs by the command line: train, stop, go on, generate; and what users get wrong."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path

import pytest

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint import folder
from keel_megatron.config import load_config
from keel_megatron.depth.profile import read_profiles
from keel_megatron.tracking.metrics import read_metrics
from tests.hosts import await_that
from tests.integration.commands import keel, start, write_config
from tools.reference.files import is_known


@pytest.fixture(scope="module")
def text() -> Path:
    """One real source file."""
    return Path(argparse.__file__)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder in which a small run was trained to its end, with dropout, on two stages."""
    home = tmp_path_factory.mktemp("finished")
    config = write_config(
        home,
        text,
        model__dropout=0.1,
        parallel__pipeline=2,
        checkpoint__every=3,
        training__validate_every=3,
        tracking__sample_prompt="def ",
        tracking__depth_every=2,
    )
    done = keel(home, "train", str(config), "--processes", "2", fresh=True)
    assert done.returncode == 0, done.stderr
    assert "unigram entropy" in done.stdout
    assert "sample (runs/test/samples.txt)" in done.stdout
    return home


def losses(home: Path) -> list[tuple[int, float, float]]:
    return [
        (line["step"], line["loss"], line["grad_norm"])
        for line in read_metrics(home / "runs" / "test" / "metrics.jsonl")
        if "loss" in line
    ]


def contents(home: Path) -> dict[str, tuple[int, int]]:
    """The run's files: size and time of change."""
    found = {}
    for path in (home / "runs" / "test").rglob("*"):
        if path.is_file():
            found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def copy_with_checkpoint(finished: Path, tmp_path: Path, step: int) -> Path:
    """The finished run as it stood after `step`."""
    home = tmp_path / "copy"
    shutil.copytree(finished, home)
    for later in folder.steps(home / "runs" / "test"):
        if later > step:
            shutil.rmtree(folder.step_folder(home / "runs" / "test", later))
    return home


def test_a_run_leaves_its_folder_complete(finished: Path) -> None:
    run = finished / "runs" / "test"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "samples.txt",
        "log.txt",
        "loss.png",
        "stages.json",
        "depth_heat_maps.png",
        "depth_latest.png",
    }
    stages = json.loads((run / "stages.json").read_text())["stages"]
    config = load_config(run / "config.yaml")
    assert sum(stage["blocks"] for stage in stages) == config.model.blocks
    assert sum(stage["parameters"] for stage in stages) == parameter_count(
        config.model, config.data.vocab_size
    )
    assert f"2 chunk(s) hold {config.model.blocks} blocks" in (run / "log.txt").read_text()
    assert folder.steps(run) == [3, 6]
    assert (folder.latest(run) / "config.yaml").read_text() == (run / "config.yaml").read_text()
    assert [step for step, _loss, _norm in losses(finished)] == [1, 2, 3, 4, 5, 6]
    held_out = [m["step"] for m in read_metrics(run / "metrics.jsonl") if "validation_loss" in m]
    assert held_out == [3, 6]
    files = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    assert [name for name in files if not is_known(name)] == [], "docs/reference/run-folder.md"


def test_a_finished_run_is_left_as_it_is(finished: Path) -> None:
    before = losses(finished)
    again = keel(finished, "train", "run.yaml", "--processes", "2")
    assert again.returncode == 0
    assert "runs/test is complete: 6 steps" in again.stdout
    assert "sample (runs/test/samples.txt)" in again.stdout
    assert losses(finished) == before


def test_resuming_on_the_same_layout_is_bit_identical(finished: Path, tmp_path: Path) -> None:
    """Dropout is on: the generators go on too."""
    home = copy_with_checkpoint(finished, tmp_path, 3)
    again = keel(home, "train", "run.yaml", "--processes", "2")
    assert again.returncode == 0, again.stderr
    assert "resuming from runs/test/checkpoints/step_00000003" in again.stdout
    assert losses(home) == losses(finished)
    profiles = [
        [json.dumps(profile.to_json()) for profile in read_profiles(folder / "runs" / "test")]
        for folder in (home, finished)
    ]
    assert profiles[0] == profiles[1]
    assert [json.loads(line)["step"] for line in profiles[0]] == [1, 2, 4, 6]


def test_the_depth_verb_tells_and_draws(finished: Path, tmp_path: Path) -> None:
    shown = keel(finished, "depth", "runs/test", "--step", "4", "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("16 sub-layers at step 4\n")
    assert {path.name for path in tmp_path.iterdir()} == {"depth_heat_maps.png", "depth_step_4.png"}
    wrong = keel(finished, "depth", "runs/test", "--step", "3")
    assert wrong.returncode == 2
    assert "there is no profile of step 3; near it are those of 1, 2, 4, 6" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_resuming_on_another_layout_agrees(tmp_path: Path, text: Path) -> None:
    config = write_config(tmp_path, text, parallel__pipeline=2, checkpoint__every=3)
    done = keel(tmp_path, "train", str(config), "--processes", "2")
    assert done.returncode == 0, done.stderr
    undisturbed = losses(tmp_path)
    shutil.rmtree(folder.step_folder(tmp_path / "runs" / "test", 6))
    again = keel(tmp_path, "train", str(config), "parallel.pipeline=1", "--processes", "1")
    assert again.returncode == 0, again.stderr
    assert "resuming from runs/test/checkpoints/step_00000003" in again.stdout
    assert len(losses(tmp_path)) == 6
    for here, there in zip(losses(tmp_path), undisturbed, strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_a_checkpoint_rebuilds_its_run(finished: Path, tmp_path: Path) -> None:
    """Without the YAML, the run's own configuration and MLflow's marker."""
    home = copy_with_checkpoint(finished, tmp_path, 3)
    run = home / "runs" / "test"
    (home / "run.yaml").unlink()
    (run / "config.yaml").unlink()
    saved = folder.step_folder(run, 3) / "config.yaml"
    again = keel(home, "train", str(saved.relative_to(home)), "--processes", "2")
    assert again.returncode == 0, again.stderr
    assert losses(home) == losses(finished)


def test_other_text_is_refused_and_nothing_is_lost(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "argparse.py"
    other.write_text(Path(argparse.__file__).read_text()[:-1000])
    before = contents(finished)
    wrong = keel(
        finished, "train", "run.yaml", "training.steps=8", f"data.text={other}", "--processes", "2"
    )
    assert wrong.returncode == 2
    assert "not the data that the run was trained on: argparse.py changed (" in (wrong.stderr)
    assert wrong.stderr.count("error: ") == 1
    assert contents(finished) == before


def test_checkpoints_are_reported(finished: Path) -> None:
    metrics = read_metrics(finished / "runs" / "test" / "metrics.jsonl")
    saves = [record for record in metrics if "checkpoint_stall_seconds" in record]
    assert [record["step"] for record in saves] == [3, 6]
    assert all(0 < r["checkpoint_stall_seconds"] <= r["checkpoint_seconds"] for r in saves)


def test_generation_is_repeatable_and_continues_the_prompt(finished: Path) -> None:
    arguments = ["generate", "runs/test", "--prompt", "class A:", "--max-new-tokens", "8"]
    first = keel(finished, *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("class A:")
    assert keel(finished, *arguments).stdout == first.stdout
    assert keel(finished, *arguments, "--seed", "1").stdout != first.stdout


def test_another_configuration_is_refused_and_nothing_is_lost(finished: Path) -> None:
    before = contents(finished)
    wrong = keel(finished, "train", "run.yaml", "model.alpha=3", "--processes", "2")
    assert wrong.returncode == 2
    assert "model.alpha: auto there, 3.0 now" in wrong.stderr
    assert wrong.stderr.count("contains a run of another configuration") == 1
    assert "Traceback" not in wrong.stderr
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("make", "settings", "expected"),
    [
        (b"\xff\xfe", [], "missing.txt is UTF-16 text"),
        (b"too short", [], "data.vocab_size: 512 is too large for this amount of data"),
        (None, ["parallel.memory_gb=0.000001"], "parallel.memory_gb"),
    ],
)
def test_what_the_ranks_refuse_leaves_no_run(
    tmp_path: Path, text: Path, make: bytes | None, settings: list[str], expected: str
) -> None:
    (tmp_path / "missing.txt").write_bytes(text.read_bytes() if make is None else make)
    config = write_config(tmp_path, text, tracking__mlflow=True)
    wrong = keel(tmp_path, "train", str(config), "data.text=missing.txt", *settings)
    assert wrong.returncode == 2
    assert expected in wrong.stderr
    assert wrong.stderr.count("error: ") == 1
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)]
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tmp_path: Path, text: Path, number: signal.Signals, code: int
) -> None:
    config = write_config(tmp_path, text)
    command = ("train", str(config), "training.steps=100000", "--processes", "1")
    metrics = tmp_path / "runs" / "test" / "metrics.jsonl"
    with start(tmp_path, *command) as process:
        try:
            await_that(lambda: len(read_metrics(metrics)) > 2, 300, "step 3")
            process.send_signal(number)
            shown, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == code
    done = losses(tmp_path)[-1][0]
    assert f"stopped after step {done} of 100000, checkpoint written" in shown
    assert folder.steps(tmp_path / "runs" / "test") == [done]
