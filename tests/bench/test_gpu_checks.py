"""How the GPU benchmark shows its checks; tests/gpu runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"
sys.path.insert(0, str(BENCH))
import gpu  # type: ignore[import-not-found]  # noqa: E402
import gpu_checks  # type: ignore[import-not-found]  # noqa: E402
import gpu_table  # type: ignore[import-not-found]  # noqa: E402

from tests.gpu.test_checks import NAMES  # noqa: E402


def test_the_tests_know_every_check() -> None:
    assert tuple(gpu_checks.CHECKS) == NAMES


def test_a_check_that_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_device: str) -> gpu_checks.Result:
        raise RuntimeError("no kernel\nimage")

    checks = {
        "first": broken,
        "second": lambda _device: gpu_checks.Result(False, "3 of 4"),
        "third": lambda device: gpu_checks.Result(True, device),
    }
    monkeypatch.setattr(gpu_checks, "CHECKS", checks)
    found = gpu_checks.run_checks("cpu")
    assert [result.passed for result in found.values()] == [False, False, True]
    assert capsys.readouterr().out.splitlines() == [
        "FAILED first: RuntimeError: no kernel image",
        "FAILED second: 3 of 4",
        "ok     third: cpu",
    ]


@pytest.mark.parametrize("ends", [True, False])
def test_the_benchmark_begins_with_the_checks_and_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: bool
) -> None:
    found = {"attention": {"passed": True, "text": "a | b"}, "step": {"passed": False, "text": "c"}}
    asked = []

    def run(command: list[str], **_: Any) -> None:
        asked.append("checks")
        if not ends:
            raise subprocess.TimeoutExpired(command, 580)
        Path(command[-1]).write_text(json.dumps(found))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    for name in (name for name in dir(gpu) if name.startswith("run_") and name != "run_checks"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name: asked.append(name))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 0
    assert asked[0] == "checks"
    assert len(asked) == 1 + len(gpu.PARTS)
    page = (tmp_path / "gpu.md").read_text()
    assert page == gpu_table.page(json.loads((tmp_path / "gpu.json").read_text()))
    if ends:
        assert "| attention | yes | a / b |\n| step | **no** | c |\n" in page
    else:
        assert "They failed: Command" in page
    assert "Nothing here is measured on a GPU yet" in page  # checks are no measurements
    assert gpu.with_earlier_checks()["measured"]
