"""How gradients reach Muon's buffers, whoever computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keel_megatron.engines.megatron.muon.buffers import _move_into


class Fused(torch.autograd.Function):
    """x W^T as a kernel does it that adds to `main_grad` itself: Transformer Engine's and Apex's.

    They mark the weight and give autograd a tensor without meaning
    (megatron-core 0.16.1, tensor_parallel/layers.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        ctx.weight.main_grad.add_(dy.t() @ x)
        ctx.weight.grad_added_to_main_grad = True
        return None, torch.full_like(ctx.weight, torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_each_micro_batchs_gradient_is_added_once(fused: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight: Any = torch.nn.Parameter(torch.randn(4, 6, dtype=dtype))
    values, sums = torch.zeros(4, 6, dtype=dtype), torch.zeros(4, 6)
    whole = weight.detach().clone()
    _move_into(weight, values, sums)
    assert torch.equal(values, whole)
    assert weight.data_ptr() == values.data_ptr()
    expected = torch.zeros(4, 6)
    for _micro_batch in range(3):
        x = torch.randn(5, 6, dtype=dtype)
        y = Fused.apply(x, weight) if fused else x @ weight.t()  # type: ignore[no-untyped-call]
        y.sum().backward()
        expected += (torch.ones(4, 5, dtype=dtype) @ x).float()
        assert weight.grad is None
    torch.testing.assert_close(sums, expected)
