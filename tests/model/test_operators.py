"""The hand-written operators against the plain ones that torch differentiates."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from keel_megatron.kernels.swiglu import swiglu
from keel_megatron.model.linear import linear
from keel_megatron.model.rotary import RotaryTable, apply_rotary, split_rotary

S, B, GROUPS, SHARED, D = 5, 3, 2, 3, 8


def plain_split(mixed: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts = mixed.view(S, B, GROUPS, SHARED + 2, D)
    query, key, value = parts.split([SHARED, 1, 1], dim=3)
    query = query.reshape(S, B, GROUPS * SHARED, D)
    return apply_rotary(query, table), apply_rotary(key.squeeze(3), table), value.squeeze(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_split_rotary_is_split_and_rotation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = RotaryTable(D, 10000.0, 2 * S, dtype)(S)
    mixed = torch.randn(S, B, GROUPS * (SHARED + 2) * D, dtype=dtype, requires_grad=True)
    results = [split_rotary(mixed, table, GROUPS), plain_split(mixed, table)]
    gradients = [torch.randn_like(one) for one in results[1]]
    bound = 1e-14 if dtype == torch.float64 else 3e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
    found, expected = (torch.autograd.grad(one, mixed, gradients) for one in results)
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_swiglu_is_its_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(S, B, 2 * 11, dtype=dtype, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    results = [swiglu(gate_up), functional.silu(gate) * up]
    gradient = torch.randn_like(results[0])
    bound = 1e-14 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(*results, rtol=bound, atol=bound)
    found, expected = (torch.autograd.grad(one, gate_up, gradient) for one in results)
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


def test_a_linear_adds_its_gradient_to_the_sum_of_the_micro_batches() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(7, 4, dtype=torch.float64))
    inputs = torch.randn(3, S, B, 4, dtype=torch.float64, requires_grad=True)
    plain = sum(linear(x, weight).square().sum() for x in inputs)
    expected = torch.autograd.grad(plain, [weight, inputs])
    weight.main_grad = torch.zeros_like(weight)
    for x in inputs:
        linear(x, weight).square().sum().backward()
    assert weight.grad is None
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, expected[0])
    torch.testing.assert_close(inputs.grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_another_type_is_left_to_whoever_keeps_it(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    weight.main_grad = torch.zeros(2, 2)
    linear(torch.ones(1, 2, dtype=dtype), weight).sum().backward()
    taken = dtype == torch.float32
    assert (weight.grad is None) == taken
    assert bool(weight.main_grad.any()) == taken


def test_a_hook_on_the_weight_sees_its_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.main_grad = torch.zeros(2, 2)
    seen = []
    weight.register_hook(seen.append)
    linear(torch.ones(1, 2), weight).sum().backward()
    assert torch.equal(seen[0], torch.ones(2, 2))
    assert torch.equal(weight.grad, torch.ones(2, 2))
