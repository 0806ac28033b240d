"""SwiGLU: silu(gate) * up, with an explicit backward pass; only its input is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keel_megatron.kernels import Backend
from keel_megatron.kernels.selection import use_triton


def swiglu(gate_up: Tensor, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up, [..., f], of [gate, up], [..., 2 f].

    `auto`: a Triton kernel each for the forward and the backward pass on CUDA
    (`triton_swiglu.py`); otherwise, and on CUDA for fp64 or where `selection.use_triton` refuses,
    as `torch`. `torch`: torch's operators with an explicit backward pass. `reference`: the
    definition, by autograd.

    Args:
        gate_up: the output of the FFN's first product.
        backend: the implementation; see above.
    """
    operation: Any = Swiglu
    if backend == "reference":
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
    fits = gate_up.dtype != torch.float64
    if use_triton("swiglu", gate_up, backend, fits=fits):
        # Imported late: importing Triton takes a second, and a CPU run does not need it.
        from keel_megatron.kernels import triton_swiglu

        operation = triton_swiglu.Swiglu
    result: Tensor = operation.apply(gate_up)
    return result


class Swiglu(torch.autograd.Function):
    """SwiGLU in torch's operators; both halves of the gradient are written in place."""

    recomputable = 0
    """The output that `recompute` computes again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """See `swiglu`."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def recompute(ctx: Any, out: Tensor) -> None:
        """Write the output again, to the bit, into `out`."""
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=out).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Gradient of [gate, up]."""
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate, d_up = gradient.chunk(2, dim=-1)
        torch.mul(dy, functional.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return gradient
