"""`keel plan` as its users call it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import environment, keel

PAPER = Path(__file__).resolve().parents[2] / "yaml" / "paper"
DEEP = str(PAPER / "keel_1024.yaml")


def planned(folder: Path, *arguments: str) -> dict[str, Any]:
    done = keel(folder, "plan", DEEP, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_one_object_holds_the_plan(tmp_path: Path) -> None:
    found = planned(tmp_path, "--gpus", "64")
    assert {"step_seconds", "tokens_per_second", "mfu", "bubble", "fits"} <= found.keys()
    assert found["fits"] is True
    keys = {"blocks", "embedding", "head", "parameters", "memory_gb", "time_share"}
    assert all(keys <= stage.keys() for stage in found["stages"])
    assert sum(stage["blocks"] for stage in found["stages"]) == 512
    assert [stage["embedding"] for stage in found["stages"]] == [True, False, False, False]
    assert [stage["head"] for stage in found["stages"]] == [False, False, False, True]
    assert max(stage["time_share"] for stage in found["stages"]) == 1.0
    seconds = 1024 * 4096 / found["tokens_per_second"]
    assert seconds == pytest.approx(found["step_seconds"])


def test_without_gpus_it_is_the_layouts_least_number(tmp_path: Path) -> None:
    found = planned(tmp_path, "parallel.tensor=2", "parallel.sequence=true")
    assert found["gpus"] == 8
    assert found["data_parallel"] == 1


def test_what_does_not_fit_is_said_with_a_change_that_does(tmp_path: Path) -> None:
    arguments = ["parallel.recompute=none", "--gpus", "512", "--gpu", "h100"]
    done = keel(tmp_path, "plan", DEEP, *arguments)
    assert done.returncode == 0
    assert "DOES NOT FIT" in done.stdout
    assert "The smallest change that fits: parallel.recompute=auto" in done.stdout
    found = planned(tmp_path, *arguments)
    assert (found["fits"], found["change"]) == (False, ["parallel.recompute=auto"])
    assert planned(tmp_path, *arguments, *found["change"])["fits"] is True


def test_the_plan_is_drawn(tmp_path: Path) -> None:
    done = keel(tmp_path, "plan", DEEP, "--gpus", "512", "--plot", "plan.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "plot: plan.png" in done.stdout


def test_the_search_prints_a_command_that_is_valid(tmp_path: Path) -> None:
    config = tmp_path / "a deep model.yaml"  # whose name a shell needs quoted
    shutil.copy(DEEP, config)
    done = keel(tmp_path, "plan", str(config), "--search", "--gpus", "128", "parallel.pipeline=8")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[:3] == ["keel", "train", str(config)]
    assert command.count("parallel.pipeline=8") <= 1
    again = keel(tmp_path, "plan", *command[2:], "--gpus", "128")
    assert again.returncode == 0, again.stderr
    assert "Memory: fits" in again.stdout
    found = json.loads(keel(tmp_path, "plan", DEEP, "--search", "--gpus", "128", "--json").stdout)
    assert found["best"][0]["overrides"] == command[3:]
    assert len(found["best"]) == 10


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--gpus", "7", "parallel.tensor=2"),
            "parallel.tensor x parallel.pipeline: 2 x 4 = 8 must divide the 7",
        ),
        (("--gpus", "0"), "--gpus"),
        (("--gpu", "v100"), "'v100' must be one of h200"),
        (("--figure", "speed=3"), "--figure: 'speed' must be one of tflops, "),
        (("--figure", "inter_node_gb=fast"), "must be NAME=NUMBER with a number above 0"),
        (("--figure", "devices_per_node=1.5"), "with an integer above 0"),
        (("--search",), "--search needs --gpus N"),
        (("--search", "--gpus", "8", "--trace"), "cannot be combined with --measure, --plot"),
        (("--trace", "--gpu", "cpu"), "--trace traces CUDA: --gpu must be a GPU"),
        (("--search", "--gpus", "8", "--measure"), "--search cannot be combined with --measure"),
        (("--measure", "parallel.tensor=2"), "parallel.tensor = 2 must be 1"),
        (("--plot", "nowhere/plan.png", "--gpus", "512"), "nowhere/plan.png cannot be written"),
        (("--trace-plot", "nowhere/trace.png", "--gpus", "512"), "trace.png cannot be written"),
        (("--gpus", "4", "training.global_batch_size=6"), "interleaving needs a multiple"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    done = keel(tmp_path, "plan", DEEP, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr
    assert done.stderr.count("error") <= 1 or "Usage" in done.stderr
    assert "Traceback" not in done.stderr


def test_figures_of_the_device_count(tmp_path: Path) -> None:
    slow = planned(tmp_path, "--gpus", "64", "--figure", "tflops=100")
    assert slow["step_seconds"] > 3 * planned(tmp_path, "--gpus", "64")["step_seconds"]


def test_a_plan_needs_none_of_the_heavy_packages() -> None:
    code = (
        "import sys, keel_megatron.cli.main as cli\n"
        f"sys.argv = ['keel', 'plan', {DEEP!r}, '--gpus', '64']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'numpy', 'matplotlib', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
