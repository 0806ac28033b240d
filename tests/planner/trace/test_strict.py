"""The CUDA path on a CPU: devices, types and shapes of every rule, host waits, and the plan."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from keel_megatron.architecture.residual import RULES
from keel_megatron.planner.trace.plot import plot_trace
from keel_megatron.planner.trace.report import describe_trace
from keel_megatron.planner.trace.result import RankTrace, merged
from keel_megatron.planner.trace.run import LIMITS, Trace
from keel_megatron.planner.trace.strict import WAITS, problems
from keel_megatron.planner.trace.tracker import Phase
from tests.planner.trace.strict import Case, trace_all
from tests.settings import small_config

HARDEST: dict[str, Any] = {
    "parallel__tensor": 2,
    "parallel__sequence": True,
    "parallel__pipeline": 2,
    "parallel__virtual_pipeline": 2,
}
PP2: dict[str, Any] = {"parallel__pipeline": 2}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (1, 1, {}),
    "PP 2 x DP 2": (4, 2, PP2),
    "TP 2 x DP 2": (4, 1, {"parallel__tensor": 2}),
    "TP 2 + SP x PP 2 x VPP 2 x DP 2": (8, 2, HARDEST),
    "PP 4, full recompute": (4, 4, {"parallel__pipeline": 4, "parallel__recompute": "full"}),
}
"""Devices, stages, overrides."""
MODELS: dict[str, dict[str, Any]] = {
    **{rule: {"model__residual": rule} for rule in RULES},
    "peri_ln": {"model__residual": "peri_ln", "model__embedding_norm": True},
    "keel, v1, tied": {"model__first_block": "v1", "model__tie_embeddings": True},
    "keel, QK-norm": {"model__qk_norm": True},
}
MUON: dict[str, Any] = {"optimizer__name": "muon"}
HYBRID: dict[str, Any] = {"model__residual": "hybrid_norm"}
OPTIONS: dict[str, Case] = {
    "dropout": Case(1, 0, {"model__dropout": 0.1}),
    "fp32": Case(2, 1, {**PP2, "training__precision": "fp32"}),
    "head in pieces": Case(1, 0, {"kernels__logits_mib": 40.0}),
    "optimizer replicated": Case(2, 0, {"parallel__distributed_optimizer": False}),
    "few activations": Case(1, 0, {"data__seq_length": 512, "parallel__recompute": "full"}),
    "light": Case(1, 0, {"parallel__recompute": "light"}),
    "full, then light": Case(1, 0, {"parallel__recompute": "auto", "parallel__memory_gb": 3.3}),
    "full for some": Case(
        4,
        1,
        {
            "parallel__pipeline": 4,
            "parallel__recompute": "auto",
            "parallel__memory_gb": 2.4,
            "model__blocks": 16,
            "data__seq_length": 4096,
            "data__vocab_size": 1024,
        },
    ),
    "two sequences": Case(1, 0, {"training__micro_batch_size": 2}),
    "overlapped": Case(
        4,
        0,
        {**PP2, "parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True},
    ),
    "Muon": Case(8, 1, {**HARDEST, **MUON}),
    "Muon's update is the fullest": Case(2, 0, {**MUON, "data__seq_length": 128}),
    "documents": Case(4, 1, {**PP2, "data__document_masks": True, "training__micro_batch_size": 2}),
}
QUICK: dict[str, Case] = {
    # Every rule at the hardest layout, the stages in turn.
    **{
        f"{name}, hardest, stage {number % 2}": Case(8, number % 2, {**HARDEST, **model})
        for number, (name, model) in enumerate(MODELS.items())
    },
    "keel, hardest, stage 1": Case(8, 1, HARDEST),
    "keel, one": Case(1, 0),
    "hybrid_norm, one": Case(1, 0, HYBRID),
    "QK-norm, one": Case(1, 0, {"model__qk_norm": True}),
    "z-loss": Case(1, 0, {"training__z_loss": 1e-4}),
    "keel, PP 2, stage 0": Case(4, 0, PP2),
    **OPTIONS,
}
FAULTS: dict[str, tuple[Case, str]] = {
    "a tensor on the host": (
        Case(1, 0, fault="a_table_on_the_host"),
        "two devices, cuda:0 and cpu",
    ),
    "a number of the host": (
        Case(1, 0, fault="a_number_of_the_host"),
        "aten.addcmul(cpu, cuda, cuda) in rstd (faults.py) has operands on two devices",
    ),
    "a host wait": (
        Case(1, 0, fault="a_wait_in_the_loss"),
        "the host waits for the device: float in mean_loss (faults.py) (2 x)",
    ),
    "a save that gathers": (
        Case(2, 0, fault="a_save_that_gathers"),
        "save: 1 x allgather_ in the group data",
    ),
    "a plan that is too low": (
        Case(1, 0, {**HYBRID, "model__blocks": 16}, fault="a_plan_without_head_norms"),
        "the plan's step is -",
    ),
    "a plan that is too high": (
        Case(1, 0, fault="a_plan_that_counts_activations_twice"),
        "the plan's step is +9.",
    ),
}


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    faults = {name: case for name, (case, _text) in FAULTS.items()}
    operators = {"joins in operators": Case(1, 0, fault="joins_in_operators")}
    return trace_all({**QUICK, **faults, **operators})


@pytest.mark.parametrize("case", QUICK)
def test_a_rank_is_as_it_should_be(case: str, quick: dict[str, Any]) -> None:
    found, _trace = quick[case]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, quick: dict[str, Any]) -> None:
    found, _trace = quick[fault]
    assert FAULTS[fault][1] in "\n".join(found)


@pytest.mark.parametrize(
    ("blocks", "deviation", "caught"),
    [
        (32, -0.001, True),
        (32, 0.0, False),
        (32, 0.019, False),
        (32, 0.03, True),
        (8, -0.001, True),
        (8, 0.03, False),
        (8, 0.051, True),
    ],
)
def test_a_plan_may_be_a_little_above_a_trace_and_never_below(
    blocks: int, deviation: float, caught: bool
) -> None:
    """2 % from 32 blocks of hidden size 1024 on, 5 % below."""
    peak = 10**9
    part = merged([Phase(peak=peak)], (peak, peak))
    trace = RankTrace(
        stage=0,
        tensor_rank=0,
        micro_batches=2,
        all_micro_batches=2,
        parts={"step": part},
        passes=part,
        planned=round((1.0 + deviation) * peak),
        curve=[],
        marks=[],
    )
    config = small_config(model__hidden_size=1024, model__blocks=blocks)
    assert bool(problems(config, trace)) == caught


def test_the_joins_in_operators_run_on_cuda(quick: dict[str, Any]) -> None:
    """Only the plan is wrong there: it counts on the fused kernel."""
    found, _trace = quick["joins in operators"]
    assert all("the plan's" in problem for problem in found), found


def test_a_trace_finds_what_is_known_of_a_step(quick: dict[str, Any]) -> None:
    _problems, trace = quick["keel, PP 2, stage 0"]
    step = trace.parts["step"]
    groups = {(what, group): number for what, group, number, _size in step.messages}
    assert (trace.micro_batches, trace.all_micro_batches) == (4, 16)
    assert groups["send", "pipeline"] == groups["recv_", "pipeline"] == 4
    # Weights and gains, each a bucket of its own.
    assert groups["reduce_scatter_tensor_coalesced_", "data"] == 2
    assert step.flops > 0
    assert trace.flops == pytest.approx(4 * step.flops)


def test_a_depth_profile_takes_no_more_memory_than_its_step(quick: dict[str, Any]) -> None:
    """A copy of the weights would be 0.7 GB beside its 3.4; a block's matrices are 0.05."""
    _problems, trace = quick["few activations"]
    assert trace.parts["depth profile"].peak < 1.02 * trace.parts["step"].peak


def test_a_save_takes_memory_on_the_host_alone(quick: dict[str, Any]) -> None:
    """12 bytes a parameter of a replica's share, copied without a wait for each tensor."""
    _problems, trace = quick["keel, PP 2, stage 0"]
    save = trace.parts["save"]
    assert save.messages == []
    assert save.peak <= trace.parts["validation"].peak
    assert sum(save.waits.values()) <= 1


def test_a_trace_is_reported_and_drawn(quick: dict[str, Any]) -> None:
    ranks = tuple(quick[name][1] for name in ("keel, one", "dropout"))
    trace = Trace(ranks, like=(0,))
    text = describe_trace(trace)
    for part in (LIMITS, f"Fullest: stage 0 in its {ranks[0].worst}, at aten."):
        assert part in text
    assert re.search("validation +save", text)
    found = json.loads(json.dumps(trace.as_object()))["ranks"][0]
    assert found["peak_bytes"] == ranks[0].peak
    assert found["reserved_bytes"] >= found["reserved_expandable_bytes"] > ranks[0].step_peak
    assert found["host_waits"]["step"].keys() < WAITS.keys()
    assert plot_trace(trace, title="two ranks", limit=6e9).startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_rule_at_every_layout_and_stage() -> None:
    cases = {
        f"{name}, {layout}, stage {stage}": Case(gpus, stage, {**overrides, **model})
        for name, model in MODELS.items()
        for layout, (gpus, stages, overrides) in LAYOUTS.items()
        for stage in range(stages)
    }
    found = trace_all(cases)
    wrong = {name: wrongs for name, (wrongs, _trace) in found.items() if wrongs}
    assert not wrong, wrong
