"""A batch size ramp-up trains alike at every layout and with either engine, and resumes exactly."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.tracking.records import StepRecord
from tests.checkpoint.ranks import Ran, Sections
from tests.settings import settings
from tests.training.rampup_ranks import trained

ENDS = [4, 8, 16, 28, 40, 52]
"""Samples consumed after each step: batches of 4, 4, 8, 12, 12 and 12."""
RAMP = {"start": 4, "increment": 4, "samples": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {},
    "DP 2, micro-batches of 1": {"training__micro_batch_size": 1},
    "PP 2 x VPP 2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
}
if importlib.util.find_spec("deepspeed"):
    LAYOUTS |= {
        f"ZeRO {stage}": {"training__engine": "deepspeed", "deepspeed__zero_stage": stage}
        for stage in (1, 3)
    }


def sections(runs: Path, name: str, **overrides: Any) -> Sections:
    wanted = {
        "training__name": name,
        "training__runs_dir": str(runs),
        "training__steps": 6,
        "training__global_batch_size": 12,
        "schedule__rampup_batch_size": RAMP,
        "schedule__decay": "constant",
        "model__blocks": 4,
        "model__hidden_size": 32,
        "model__ffn_hidden_size": 64,
        "model__dropout": 0.0,
        "checkpoint__every": 3,
    }
    return settings(**{**wanted, **overrides})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Runs in one process: a whole one, one that ends in the ramp-up, and the same to its end."""
    runs = tmp_path_factory.mktemp("runs")
    found = trained(
        1,
        {
            "whole": sections(runs, "whole"),
            "begun": sections(runs, "halves", training__steps=3),
            "resumed": sections(runs, "halves"),
        },
    )
    return {name: ranks[0] for name, ranks in found.items()}


def consumed(ran: Ran) -> list[int]:
    return [record.consumed_samples for record in ran.records if isinstance(record, StepRecord)]


def test_a_resume_within_the_ramp_up_is_exact(alone: dict[str, Ran]) -> None:
    whole, begun, resumed = alone.values()
    assert consumed(whole) == ENDS
    assert (consumed(begun), consumed(resumed)) == (ENDS[:3], ENDS[3:])
    assert begun.losses + resumed.losses == whole.losses
    assert resumed.digest == whole.digest


def test_every_layout_and_engine_trains_like_one_process(
    alone: dict[str, Ran], tmp_path: Path
) -> None:
    runs = {name: sections(tmp_path, f"r{n}", **o) for n, (name, o) in enumerate(LAYOUTS.items())}
    for name, ranks in trained(2, runs).items():
        ran = ranks[0]
        assert ran.error is None, name
        assert consumed(ran) == ENDS, name
        for here, there in zip(ran.losses, alone["whole"].losses, strict=True):
            assert here == pytest.approx(there, rel=1e-5), name
