"""SwiGLU's Triton kernels against the definition in fp64, in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.kernels.swiglu import swiglu
from tests.kernels.cases import DEVICE

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Relative error of one rounding, which Triton's interpreter does by truncation; fp32 also has that
of the sigmoid."""


def pair(rows: int, f: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100_003 + f)
    gate_up = 3 * torch.randn(rows, 1, 2 * f, generator=generator)
    dy = torch.randn(rows, 1, f, generator=generator)
    return gate_up.to(DEVICE, dtype), dy.to(DEVICE, dtype)


def both(gate_up: torch.Tensor, dy: torch.Tensor, backend: str) -> list[torch.Tensor]:
    gate_up = gate_up.detach().clone().requires_grad_()
    y = swiglu(gate_up, backend)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, gate_up, dy)]


def agree(rows: int, f: int, dtype: torch.dtype) -> None:
    gate_up, dy = pair(rows, f, dtype)
    exact = both(gate_up.double(), dy.double(), "reference")
    found = both(gate_up, dy, "triton")
    bound = BOUNDS[dtype]
    for one, true in zip(found, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), true, rtol=bound, atol=max(bound * 1e-2, 1e-6))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    f=st.sampled_from([1, 11, 64, 100, 160, 1000, 1024, 1025, 2816]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_agrees(rows: int, f: int, dtype: torch.dtype) -> None:
    agree(rows, f, dtype)


def test_large_gates_saturate() -> None:
    gate_up = torch.tensor([[100.0, -100.0, 0.0, 2.0, 3.0, 4.0]], device=DEVICE)
    y, gradient = both(gate_up, torch.ones(1, 3, device=DEVICE), "triton")
    torch.testing.assert_close(y.cpu(), torch.tensor([[200.0, 0.0, 0.0]]))
    expected = torch.tensor([[2.0, 0.0, 2.0, 100.0, 0.0, 0.0]])
    torch.testing.assert_close(gradient.cpu(), expected)


def test_no_rows_are_no_work() -> None:
    y, gradient = both(*pair(0, 8, torch.float32), "triton")
    assert (y.shape, gradient.shape) == ((0, 1, 8), (0, 1, 16))


def test_strides_do_not_matter() -> None:
    gate_up, dy = pair(6, 32, torch.float32)
    turned = [t.permute(2, 1, 0).contiguous().permute(2, 1, 0) for t in (gate_up, dy)]
    for one, other in zip(both(gate_up, dy, "triton"), both(*turned, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_computed_again_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    gate_up, _ = pair(5, 100, dtype)
    y = swiglu(gate_up.requires_grad_(), backend)  # type: ignore[arg-type]
    node = y.grad_fn
    again = torch.full_like(y, float("nan"))
    with torch.no_grad():
        node._forward_cls.recompute(node, again)
    assert torch.equal(again, y)
