"""Communication between replicas that overlaps with the passes.

Gathered weights arrive only when they are waited for (`late_gathers`), so whatever reads weights
without waiting reads old ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.config.run import RunConfig
from keel_megatron.engines.megatron.overlap import overlaps_grad_reduce, overlaps_param_gather
from tests.distributed import run_ranks
from tests.engines.megatron.ranks import (
    groups_left,
    order_of_reductions,
    overlapping,
    run_both,
    shards,
    with_and_without,
)
from tests.settings import settings

# Bits of the gradient norm depend on where buckets end, and so do updates that it scales.
UNCLIPPED = {"model__blocks": 3, "optimizer__clip_grad": 0.0}
BF16 = {"training__precision": "bf16"}
TWO: list[dict[str, Any]] = [
    {},
    {**BF16, "model__residual": "hybrid_norm"},
    {**BF16, "model__tie_embeddings": True, "parallel__recompute": "full"},
    {**BF16, "parallel__distributed_optimizer": False},
]
FOUR: list[dict[str, Any]] = [
    {**BF16, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "model__blocks": 4},
    {**BF16, "parallel__tensor": 2, "parallel__sequence": True},
]


def test_it_is_off_by_default_and_with_one_replica() -> None:
    """On CUDA too: in which order its hooks start reductions there has not been seen."""
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda"), data_size=2)
    one: Any = SimpleNamespace(device=torch.device("cuda"), data_size=1)
    wanted = RunConfig.model_validate(overlapping(settings(), True))
    for overlaps in (overlaps_grad_reduce, overlaps_param_gather):
        assert not overlaps(RunConfig.model_validate(settings()), on_cuda)
        assert overlaps(wanted, on_cuda)
        assert not overlaps(wanted, one)


@pytest.mark.parametrize(("size", "cases"), [(2, TWO), (4, FOUR)])
def test_losses_are_equal_to_the_bit(size: int, cases: list[dict[str, Any]]) -> None:
    runs = [settings(**{**UNCLIPPED, **case}) for case in cases]
    for rank in run_ranks(size, with_and_without, runs, timeout_seconds=900):
        for case, (overlapped, plain, gathers) in zip(cases, rank, strict=True):
            assert [loss for loss, _norm in overlapped] == [loss for loss, _norm in plain], case
            assert overlapped == [pytest.approx(step, rel=1e-5) for step in plain], case
            expected = case.get("parallel__distributed_optimizer", True)
            assert (gathers > 5) == expected, case


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_reduced_before_the_pass_ends(precision: str) -> None:
    """fp32 gradients are added to the sum by the product itself: DDP sees none of them."""
    sections = settings(**UNCLIPPED, training__precision=precision)
    for events, groups in run_ranks(2, order_of_reductions, overlapping(sections, True)):
        assert groups > 2
        assert events == ["reduce"] * groups + ["finalize"]
    ((events, groups), _other) = run_ranks(2, order_of_reductions, overlapping(sections, False))
    assert events == ["finalize"] + ["reduce"] * groups


def test_checkpoints_are_equal_to_the_byte(tmp_path: Path) -> None:
    """One is saved after every step, and the run resumes from one."""

    def run(name: str, overlapped: bool, steps: int) -> dict[str, Any]:
        sections = settings(
            **{**UNCLIPPED, **BF16},
            training__runs_dir=str(tmp_path),
            training__name=name,
            training__steps=steps,
            checkpoint__every=1,
            checkpoint__keep=9,
        )
        return overlapping(sections, overlapped)

    runs = [run(name, name == "late", steps) for steps in (2, 4) for name in ("late", "plain")]
    for rank in run_ranks(2, run_both, runs):
        first, plain_first, second, plain_second = rank
        assert (first, second) == (plain_first, plain_second)
    for step in (1, 2, 3, 4):
        late, plain = (shards(tmp_path / name, step) for name in ("late", "plain"))
        assert late == plain
        assert late


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_that_is_gone_leaves_no_process_groups() -> None:
    """Each costs a CPU a hundred wake-ups a second; Megatron-core keeps one of its own."""
    assert run_ranks(1, groups_left, settings())[0] < 10
