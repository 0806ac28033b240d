"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in its rotate-half form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keel_megatron.kernels.head_norms import Weights, head_norms
from keel_megatron.kernels.selection import Backend, use_triton


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once and shared by all blocks.

    Replaces `rotary_pos_emb` of Megatron-core's GPTModel, which passes the angles to each block and
    recomputes their cosines there.

    Args:
        head_dim: d, even.
        theta: base of the geometric series of frequencies.
        seq_length: longest sequence.
        dtype: type of the table, the compute type.
    """

    table: Tensor

    def __init__(self, head_dim: int, theta: float, seq_length: int, dtype: torch.dtype) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        positions = torch.arange(seq_length, dtype=torch.float64)
        angles = torch.outer(positions, theta**-exponents)
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        self.register_buffer("table", table.to(dtype)[:, :, None, None, :], persistent=False)

    def get_rotary_seq_len(
        self,
        inference_context: Any,  # noqa: ARG002
        transformer: Any,
        transformer_input: Tensor | None,
        config: Any,
        packed_seq_params: Any = None,  # noqa: ARG002
    ) -> int:
        """Whole sequence length of the stage's input [s, b, h] (s is split under SP)."""
        states = transformer_input if transformer_input is not None else transformer.input_tensor
        factor = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return int(states.size(0)) * int(factor)

    def forward(self, seq_length: int, **_: Any) -> Tensor:
        """Table [2, s, 1, 1, d]: cos, then sin (its first half negated), in the compute type."""
        return self.table[:, :seq_length]


def split_rotary(
    mixed: Tensor,
    table: Tensor,
    groups: int,
    backend: Backend = "auto",
    *,
    norms: Weights | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of linear_qkv's output, query and key rotated.

    `auto`: one Triton kernel each for the forward and backward pass on CUDA
    (`kernels/triton_rotary.py`, with norms `kernels/triton_norm_rotary.py`); otherwise, and on CUDA
    for fp64 or where `selection.use_triton` refuses, as `torch`: torch's operators.

    Args:
        mixed: [s, b, groups x (queries of a group + 2) x d], Megatron-core's order.
        table: RotaryTable's, [2, s, 1, 1, d].
        groups: key/value heads on this rank.
        backend: the implementation; see above.
        norms: weights of the norms of heads (`kernels.head_norms`) that come before; None: none.
        eps: their epsilon.

    Returns:
        query [s, b, heads, d], key and value [s, b, groups, d].

    Raises:
        ValueError: `triton` does not support the input.
    """
    operation: Any
    fits = mixed.dtype in (torch.float32, torch.bfloat16)
    if use_triton("rotary", mixed, backend, fits=fits):
        # Imported late: importing Triton takes a second, and a CPU run does not need it.
        from keel_megatron.kernels import triton_norm_rotary, triton_rotary

        if norms is not None:
            operation = triton_norm_rotary.SplitNormRotary
            normed: tuple[Tensor, Tensor, Tensor] = operation.apply(
                mixed, table, *norms, groups, eps
            )
            return normed
        operation = triton_rotary.SplitRotary
    else:
        operation = _SplitRotary
        mixed = mixed if norms is None else head_norms(mixed, norms, groups, eps)
    result: tuple[Tensor, Tensor, Tensor] = operation.apply(mixed, table, groups)
    return result


class _SplitRotary(torch.autograd.Function):
    """Split, rotation and layout in one pass over every element each way.

    The pairs (x_i, x_{i + d/2}) are rotated by the table's angles, whose sine carries the sign. The
    backward pass rotates back and writes all three gradients into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor, groups: int) -> tuple[Tensor, ...]:
        """See `split_rotary`."""
        ctx.save_for_backward(table)
        s, b = mixed.shape[:2]
        d = table.size(-1)
        parts = mixed.view(s, b, groups, -1, d)
        shared = parts.size(3) - 2
        query = mixed.new_empty(s, b, groups, shared, d)
        key = mixed.new_empty(s, b, groups, 1, d)
        cos, sin = table.unsqueeze(-2).unbind(0)
        _turn(parts[..., :shared, :], cos, sin, query)
        _turn(parts[..., shared : shared + 1, :], cos, sin, key)
        value = parts[..., shared + 1, :].contiguous()
        return query.view(s, b, -1, d), key.view(s, b, groups, d), value

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, None, None]:
        """The gradient of `mixed`."""
        (table,) = ctx.saved_tensors
        s, b, groups, d = d_key.shape
        shared = d_query.size(2) // groups
        gradient = d_key.new_empty(s, b, groups, shared + 2, d)
        cos, sin = table.unsqueeze(-2).unbind(0)
        d_query = d_query.reshape(s, b, groups, shared, d)
        _turn(d_query, cos, sin, gradient[..., :shared, :], back=True)
        _turn(d_key.unsqueeze(3), cos, sin, gradient[..., shared : shared + 1, :], back=True)
        gradient[..., shared + 1, :].copy_(d_value)
        return gradient.view(s, b, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> None:
    """Write x cos + swap(x) sin to `out`, where swap exchanges the halves of the last dimension."""
    half, sign = x.size(-1) // 2, -1 if back else 1
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [s, b, heads, d] with autograd; the reference of `split_rotary`.

    The table's sine carries the sign, so the half-turn (-x2, x1) * sin is a swap of halves.
    """
    half = x.size(-1) // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * table[0] + swapped * table[1]
