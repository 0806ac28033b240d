"""The Triton kernels against the definition in fp64, in Triton's interpreter where no GPU is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.kernels import scaled_add_norm
from tests.kernels.cases import DEVICE, EPS, Case, disagreement, error, inputs, run

SIZES = [64, 65, 96, 100, 127, 128, 192, 255, 256, 257, 640, 1000, 1024, 1536, 3072]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
worst: dict[str, float] = {}


def agree(case: Case) -> None:
    exact = run(case, "exact")
    found = run(case, "triton")
    for result, true in zip(found, exact, strict=True):
        key = str(result.dtype)
        worst[key] = max(worst.get(key, 0.0), error(result, true))
    assert not disagreement(found, exact), case


any_shape = given(
    rows=st.integers(1, 40),
    hidden_size=st.sampled_from(SIZES),
    alpha=st.sampled_from([1.0, 16.0, 1024.0]),
    f_dtype=DTYPES,
    z_dtype=DTYPES,
    gain_dtype=DTYPES,
    outer=st.booleans(),
    inner=st.booleans(),
    scale=st.sampled_from([1.0, 1e-3]),
)


@settings(max_examples=50, deadline=None)
@any_shape
def test_any_shape_agrees(**settings: object) -> None:
    agree(Case(**settings))  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@any_shape
def test_many_shapes_agree(**settings: object) -> None:
    agree(Case(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden_size", [2048, 4096, 8192, 16384])
def test_the_widest_agree(hidden_size: int) -> None:
    agree(Case(3, hidden_size, 1024.0, torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("rows", [127, 128, 129, 1031])
def test_many_rows_are_shared_by_few_programs(rows: int) -> None:
    """Around 4 programs of 32 rows each (without a GPU), and far above."""
    agree(Case(rows, 64))


def test_no_rows_are_no_work() -> None:
    found = run(Case(0, 64), "triton")
    assert found[0].shape == (0, 1, 64)
    assert torch.equal(found[-1].cpu(), torch.zeros(64))
    assert torch.equal(found[-2].cpu(), torch.zeros(64))


def test_strides_do_not_matter() -> None:
    (x, f, outer, inner), _ = inputs(Case(6, 96))
    turned = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (x, f)]
    assert not turned[0].is_contiguous()
    for one, other in zip(
        scaled_add_norm(x, f, 2.0, outer, inner, EPS, torch.float32, "triton"),
        scaled_add_norm(*turned, 2.0, outer, inner, EPS, torch.float32, "triton"),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 64, dtype=torch.float64), torch.ones(1, 16448), torch.ones(2, 64).bfloat16()],
    ids=["fp64", "wide", "bf16"],
)
def test_what_it_cannot_do_is_refused(x: torch.Tensor) -> None:
    x = x.to(DEVICE)
    with pytest.raises(ValueError, match="backend='torch'"):
        scaled_add_norm(x, x, 1.0, None, None, EPS, x.dtype, "triton")


@pytest.mark.parametrize("case", [Case(100, 257, 128.0), Case(1031, 64), Case(9, 4096)])
def test_two_runs_give_the_same_bits(case: Case) -> None:
    case = dataclasses.replace(case, f_dtype=torch.bfloat16, z_dtype=torch.bfloat16)
    for first, second in zip(run(case, "triton"), run(case, "triton"), strict=True):
        assert torch.equal(first, second)


def test_zz_how_far_apart_they_were() -> None:
    """Reports the largest errors of this file."""
    assert worst
    print("largest errors:", {key: f"{value:.1e}" for key, value in worst.items()})
