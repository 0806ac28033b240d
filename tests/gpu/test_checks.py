"""The checks with which a GPU's tests and benchmarks begin; on a CPU as far as they mean something.

`make test-gpu` runs this folder first. Without a GPU the same code runs on the CPU: then a check
that breaks for another reason than the device is not first seen on one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "bench" / "gpu_checks.py"
NAMES = (
    *("attention", "memory size", "fp64 norm", "weight gradients", "operators", "repeats"),
    *("staging", "messages", "training run", "step"),
)
DEVICES = [
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
    "cpu",
]


@pytest.fixture(scope="module", params=DEVICES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the checks say of a device, by name, from a process of their own."""
    out = tmp_path_factory.mktemp("checks") / "found.json"
    command = [sys.executable, str(SCRIPT), "--device", request.param, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert out.exists(), done.stdout + done.stderr
    results = json.loads(out.read_text())
    passed = all(result["passed"] for result in results.values())
    assert (done.returncode, len(results)) == (0 if passed else 1, len(NAMES))
    assert done.stdout.count("\n") == len(NAMES)  # a line each
    return results


@pytest.mark.parametrize("name", NAMES)
def test_the_device_passes(found: dict[str, Any], name: str) -> None:
    print(f"{name}: {found[name]['text']}")
    assert found[name]["passed"], found[name]["text"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_checks_say_so() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout
