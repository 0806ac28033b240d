"""SwiGLU as two Triton kernels, forward and backward.

Forward reads gate and up once and writes their product once; backward reads both and the product's
gradient and writes the two gradients. The arithmetic is fp32, so a result is rounded once.

A program has a block of columns of one row. Both halves are written by one program, so neither pass
needs a copy to join them.

Source of the backward formulas: with s = sigmoid(gate) and silu(gate) = gate s,

    d_up = dy gate s,   d_gate = dy up s (1 + gate (1 - s)).
"""

# Triton's functions take pointers, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDEST, _WARPS = 1024, 4
"""Columns of a program: 8 a thread, which bf16 loads and stores in 16 bytes."""


@triton.jit
def _forward(gate_up_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(gate_up_ptr + row * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * F + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(gate_up_ptr, dy_ptr, gradient_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    at = row * (2 * F) + column
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * F + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = dy * up * s * (1.0 + gate * (1.0 - s))
    d_up = dy * gate * s
    kind = gradient_ptr.dtype.element_ty
    tl.store(gradient_ptr + at, d_gate.to(kind), mask=mask)
    tl.store(gradient_ptr + at + F, d_up.to(kind), mask=mask)


class Swiglu(torch.autograd.Function):
    """See kernels.swiglu.swiglu; differentiable once."""

    recomputable = 0
    """The output that `recompute` computes again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """See `kernels.swiglu.swiglu`."""
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.size(-1) // 2)
        _write(gate_up, y)
        return y

    @staticmethod
    def recompute(ctx: Any, out: Tensor) -> None:
        """Write the output again, to the bit, into `out`."""
        _write(ctx.saved_tensors[0], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Gradient of [gate, up]."""
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        if gradient.numel():
            grid, constants = _launch(gate_up)
            _backward[grid](gate_up, dy.contiguous(), gradient, **constants)
        return gradient


def _write(gate_up: Tensor, y: Tensor) -> None:
    if y.numel():
        grid, constants = _launch(gate_up)
        _forward[grid](gate_up, y, **constants)


def _launch(gate_up: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants for [gate, up] [..., 2 f]."""
    f = gate_up.size(-1) // 2
    block = min(_WIDEST, triton.next_power_of_2(f))
    rows = gate_up.numel() // (2 * f)
    return (rows, triton.cdiv(f, block)), {"F": f, "BLOCK": block, "num_warps": _WARPS}
