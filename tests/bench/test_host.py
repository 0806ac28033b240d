"""`tools/bench/host.py`, the calibration of the host's times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keel_megatron.architecture.residual import RULES
from keel_megatron.layout.host_times import FIGURES

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "tools" / "bench" / "host.py"


def test_a_rule_is_measured_as_cudas_path_runs_it() -> None:
    """Of the size of the stored figures, wherever it is measured."""
    command = [sys.executable, str(TOOL), "--rule", "keel", "--samples", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1])
    stored = json.loads(FIGURES.read_text())["blocks"]["keel"]
    for way in ("forward_us", "backward_us"):
        assert 0.1 * stored[way] < found["block"][way] < 10 * stored[way]
    assert found["chunk"].keys() == found["ends"].keys() == found["block"].keys()


def test_every_rule_is_calibrated_and_says_how() -> None:
    stored = json.loads(FIGURES.read_text())
    assert stored["blocks"].keys() == RULES.keys()
    assert stored["command"] == "python tools/bench/host.py"
    assert {"machine", "date", "packages"} <= stored.keys()


def test_some_rules_are_measured_beside_keel(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.bench import host

    added = {"forward_us": 10.0, "backward_us": -20.0}
    monkeypatch.setattr(host, "in_process", lambda _rule, *_options: added)
    stored = json.loads(FIGURES.read_text())
    found = host.update(["peri_ln"])
    blocks, keel = found["blocks"], stored["blocks"]["keel"]
    assert blocks.pop("peri_ln") == {way: round(keel[way] + added[way], 1) for way in keel}
    assert blocks == {rule: one for rule, one in stored["blocks"].items() if rule != "peri_ln"}
