"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202) on Megatron-core's modules."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer import mlp
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keel_megatron.compat import modules


class MLP(mlp.MLP):
    """W_down (silu(W_gate x) * (W_up x)); gate and up are one product.

    The modules (linear_fc1, linear_fc2) and their sharding are Megatron-core's.
    """

    def __init__(self, config: Any, submodules: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, **modules.mlp_arguments(config, kwargs))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The branch's output for its normalised input [s, b, h] ([s/TP, b, h] under SP)."""
        gate_up, _bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., f], of [gate, up], [..., 2 f].

    Only `gate_up` is kept for the backward pass. On CUDA, uses Megatron-core's compiled kernel.
    """
    if gate_up.is_cuda:
        return bias_swiglu_impl(gate_up, None)
    operation: Any = _Swiglu
    result: Tensor = operation.apply(gate_up)
    return result


class _Swiglu(torch.autograd.Function):
    """SwiGLU in torch's operators; both halves of the gradient are written in place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate, d_up = gradient.chunk(2, dim=-1)
        torch.mul(dy, functional.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return gradient
