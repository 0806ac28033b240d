"""Step times of many runs: what they have in common is measured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import yaml
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.layout.times import Times, UnitTimes
from keel_megatron.planner import measure
from keel_megatron.planner.plan import Measured
from keel_megatron.planner.step_times import main, step_times
from tests.settings import settings


def run(folder: Path, *changes: str) -> dict[str, Any]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    return {"path": str(path), "settings": list(changes), "processes": 1}


def test_depths_share_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def pieces(config: RunConfig) -> Measured:
        measured.append(config.model.residual)
        if config.model.residual == "mix_ln":
            raise UserError("no such measurement")
        block, rest = Times(1.0, 2.0), Times(0.0, 0.0)
        return Measured(UnitTimes(rest, block, rest, 1.0), 0.5, 0.0)

    monkeypatch.setattr(measure, "measure_pieces", pieces)
    asked = [
        run(tmp_path, "model.blocks=2"),
        run(tmp_path, "model.blocks=6", "optimizer.learning_rate=1e-4"),
        run(tmp_path, "model.residual=pre_ln", "model.blocks=2"),
        run(tmp_path, "model.residual=mix_ln", "model.blocks=8"),
    ]
    found = step_times(None, asked)
    assert measured == ["keel", "pre_ln", "mix_ln"]
    # 8 micro-batches of 3 s a block, and the update of 0.5 s a block.
    assert [one.get("step_seconds") for one in found[:3]] == pytest.approx([49.0, 147.0, 49.0])
    assert found[3] == {"problem": "no such measurement"}


def test_a_request_for_a_gpu_is_answered_without_measuring(tmp_path: Path) -> None:
    huge = run(tmp_path, "model.blocks=512", "model.hidden_size=8192", "training.device=cuda")
    asked = {"gpu": "h200", "runs": [run(tmp_path), huge]}
    (tmp_path / "asked").write_text(json.dumps(asked))
    main(tmp_path / "asked", tmp_path / "answer")
    small, large = json.loads((tmp_path / "answer").read_text())["runs"]
    assert 0 < small["step_seconds"] < 10
    assert "1024 sub-layers do not fit on 1 x h200" in large["problem"]
