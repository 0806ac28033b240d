"""Which stages are traced, what cannot be, and how a trace is scaled to the whole step."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config.load import load_config
from keel_megatron.errors import UserError
from keel_megatron.layout.devices import device_named
from keel_megatron.planner.plan import Plan, make_plan
from keel_megatron.planner.trace.report import messages
from keel_megatron.planner.trace.result import Part, RankTrace, curve_of
from keel_megatron.planner.trace.run import check_traceable, distinct_stages, trace_plan
from tests.settings import small_config

PAPER = Path(__file__).resolve().parents[3] / "yaml" / "paper"


def planned(name: str, gpus: int, *overrides: str) -> Plan:
    config = load_config(PAPER / name, overrides, world_size=gpus)
    return make_plan(config, gpus, device_named("h200"))


def test_stages_that_hold_the_same_are_traced_once() -> None:
    assert distinct_stages(planned("keel_1024.yaml", 64)) == (0, 1, 2, 3)
    # With one micro-batch in flight everywhere the stages in the middle are alike.
    few = ["parallel.virtual_pipeline=1", "training.global_batch_size=16", "parallel.pipeline=4"]
    layout = "parallel.layout=[127,129,129,127]"
    assert distinct_stages(planned("keel_1024.yaml", 64, *few, layout)) == (0, 1, 1, 3)


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ({}, "cpu", "--gpu must be a GPU"),
        ({"training__engine": "deepspeed"}, "h200", "not training.engine: deepspeed"),
        ({"kernels__compile": True}, "h200", "kernels.compile must be false"),
        ({"kernels__backend": "apex"}, "h200", "kernels.backend must be auto, not apex"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    overrides: dict[str, Any], device: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        check_traceable(small_config(**overrides), device)


def part(flops: float, kernels: int, sends: int) -> Part:
    return Part(
        peak=100,
        peak_by={},
        peak_operator="aten.mm",
        peak_where="f (f.py)",
        reserved=120,
        reserved_expandable=110,
        host_peak=0,
        flops=flops,
        kernels={"aten.mm": kernels},
        messages=[("send", "pipeline", sends, 8 * sends), ("all_reduce", "data", 1, 4)],
        waits={},
        mixed={},
    )


def test_what_the_passes_do_is_scaled_to_all_micro_batches() -> None:
    passes = part(10.0, 50, 2)
    trace = RankTrace(
        stage=0,
        tensor_rank=0,
        micro_batches=2,
        all_micro_batches=6,
        parts={"step": part(11.0, 60, 2)},
        passes=passes,
        planned=104,
        curve=[],
        marks=[],
    )
    assert trace.flops == 11.0 + 2 * 10.0
    assert trace.launches == 60 + 2 * 50
    assert trace.deviation == pytest.approx(0.04)
    found = {(what, group): (number, size) for what, group, number, size in trace.messages()}
    assert found["send", "pipeline"] == (6, 48)
    assert "pipeline 6 x 8B" in messages(trace)


def test_a_curve_keeps_the_highest_of_what_it_leaves_out() -> None:
    events = [(1, key) for key in range(9000)] + [(-1, key) for key in range(9000)]
    curve, marks = curve_of(events, [(0, "build"), (9, "states"), (9000, "step"), (9001, "update")])
    assert len(curve) < 2500
    assert max(size for _at, size in curve) == 9000
    assert marks == [(0.0, "build"), (0.5, "step")]


def interrupt_of(_request: Any) -> Any:
    """Instead of a trace: what Ctrl-C does in the process."""
    return signal.getsignal(signal.SIGINT)


def test_ctrl_c_ends_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an exception it would be the result of their task, and the next would begin."""
    monkeypatch.setattr("keel_megatron.planner.trace.rank.trace_rank", interrupt_of)
    plan = planned("keel_1024.yaml", 64)
    plan = replace(plan, partition=replace(plan.partition, stages=plan.partition.stages[:1]))
    assert trace_plan(plan).ranks == (signal.SIG_DFL,)
