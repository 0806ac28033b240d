"""Norms of heads, split and rotation as one Triton kernel each way.

As `triton_rotary.py`, with the norms of `head_norms.py` in between: a program has whole heads, so
their statistics cost no pass over memory. Forward every element is read and written once. The
backward pass reads the fused tensor once more, computes the statistics again and leaves the
weights' gradients as one row a program, which torch adds up. Nothing is kept besides the fused
tensor. The arithmetic is fp32, and a result is rounded once.
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

from keel_megatron.kernels.triton_rotary import (
    DTYPES,
    _angles,
    _load_pair,
    _place,
    _store_pair,
    tile_of,
)


@triton.jit
def _rstd(one, two, eps, HALF: tl.constexpr):
    squares = tl.sum(one * one + two * two, axis=1, keep_dims=True)
    return 1.0 / tl.sqrt(squares / (2 * HALF) + eps)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    mixed_ptr, table_ptr,  # as in triton_rotary.py
    query_gain_ptr, key_gain_ptr, value_gain_ptr,  # [2 HALF]; the value's is not read without VALUE
    query_ptr, key_ptr, value_ptr,
    tokens, batch, sine_at, eps,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    group, member, token, column, in_token, in_column, to = _place(
        tokens, GROUPS, SHARED, HALF, BLOCK_T, BLOCK_HALF
    )
    mask = in_token & in_column
    one, two = _load_pair(mixed_ptr, to, mask, HALF)
    at_group = (token * GROUPS + group) * (2 * HALF) + column
    if member == SHARED + 1:
        if VALUE:
            first, second = _load_pair(value_gain_ptr, column, in_column, HALF)
            rstd = _rstd(one, two, eps, HALF)
            _store_pair(value_ptr, at_group, one * rstd * first, two * rstd * second, mask, HALF)
        else:
            _store_pair(value_ptr, at_group, one, two, mask, HALF)
    else:
        rstd = _rstd(one, two, eps, HALF)
        position = token // batch
        cos, sin = _angles(table_ptr, position, in_token, column, in_column, HALF, sine_at)
        if member == SHARED:
            first, second = _load_pair(key_gain_ptr, column, in_column, HALF)
            one, two = one * rstd * first, two * rstd * second
            _store_pair(key_ptr, at_group, one * cos - two * sin, two * cos + one * sin, mask, HALF)
        else:
            first, second = _load_pair(query_gain_ptr, column, in_column, HALF)
            one, two = one * rstd * first, two * rstd * second
            at = ((token * GROUPS + group) * SHARED + member) * (2 * HALF) + column
            _store_pair(query_ptr, at, one * cos - two * sin, two * cos + one * sin, mask, HALF)


@triton.jit
def _norm_backward(
    mixed_ptr, d_mixed_ptr, gain_ptr, sums_ptr, to, d_one, d_two, column, mask, in_column, eps,
    HALF: tl.constexpr,
):  # fmt: skip
    """The gradient of a head's tokens, and of its weights summed over them."""
    one, two = _load_pair(mixed_ptr, to, mask, HALF)
    first, second = _load_pair(gain_ptr, column, in_column, HALF)
    rstd = _rstd(one, two, eps, HALF)
    one, two = one * rstd, two * rstd
    product_one, product_two = d_one * one, d_two * two
    along = tl.sum(product_one * first + product_two * second, axis=1, keep_dims=True) / (2 * HALF)
    d_one, d_two = (d_one * first - one * along) * rstd, (d_two * second - two * along) * rstd
    _store_pair(d_mixed_ptr, to, d_one, d_two, mask, HALF)
    at = tl.program_id(0).to(tl.int64) * (2 * HALF) + column
    sum_one = tl.sum(product_one, axis=0, keep_dims=True)
    sum_two = tl.sum(product_two, axis=0, keep_dims=True)
    _store_pair(sums_ptr, at, sum_one, sum_two, in_column, HALF)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    d_query_ptr, d_key_ptr, d_value_ptr,  # as in triton_rotary.py
    mixed_ptr, table_ptr, query_gain_ptr, key_gain_ptr, value_gain_ptr,
    d_mixed_ptr, sums_ptr,  # [programs, 2 HALF], fp32
    tokens, batch, sine_at, eps,
    query_s, query_b, query_head, key_s, key_b, key_head, value_s, value_b, value_head,
    GROUPS: tl.constexpr, SHARED: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    group, member, token, column, in_token, in_column, to = _place(
        tokens, GROUPS, SHARED, HALF, BLOCK_T, BLOCK_HALF
    )
    mask = in_token & in_column
    position = token // batch
    sequence = token % batch
    if member == SHARED + 1:
        at = position * value_s + sequence * value_b + group * value_head + column
        one, two = _load_pair(d_value_ptr, at, mask, HALF)
        if VALUE:
            _norm_backward(
                mixed_ptr, d_mixed_ptr, value_gain_ptr, sums_ptr, to, one, two, column, mask,
                in_column, eps, HALF,
            )  # fmt: skip
        else:
            _store_pair(d_mixed_ptr, to, one, two, mask, HALF)
    else:
        cos, sin = _angles(table_ptr, position, in_token, column, in_column, HALF, sine_at)
        if member == SHARED:
            at = position * key_s + sequence * key_b + group * key_head + column
            one, two = _load_pair(d_key_ptr, at, mask, HALF)
            _norm_backward(
                mixed_ptr, d_mixed_ptr, key_gain_ptr, sums_ptr, to, one * cos + two * sin,
                two * cos - one * sin, column, mask, in_column, eps, HALF,
            )  # fmt: skip
        else:
            at = position * query_s + sequence * query_b + column
            at += (group * SHARED + member) * query_head
            one, two = _load_pair(d_query_ptr, at, mask, HALF)
            _norm_backward(
                mixed_ptr, d_mixed_ptr, query_gain_ptr, sums_ptr, to, one * cos + two * sin,
                two * cos - one * sin, column, mask, in_column, eps, HALF,
            )  # fmt: skip


class SplitNormRotary(torch.autograd.Function):
    """`kernels.head_norms` and `model.rotary.split_rotary` together, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        table: Tensor,
        query_gain: Tensor,
        key_gain: Tensor,
        value_gain: Tensor | None,
        groups: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        """See `model.rotary.split_rotary`.

        Raises:
            ValueError: the types are not supported or differ.
        """
        if mixed.dtype not in DTYPES or table.dtype != mixed.dtype:
            raise ValueError(
                f"the Triton kernel needs fp32 or bf16 and a table of the same type; these are "
                f"{mixed.dtype} and {table.dtype}: use backend='torch'"
            )
        mixed = mixed.contiguous()
        gains = (query_gain, key_gain, value_gain)
        ctx.save_for_backward(mixed, table, *gains)
        ctx.groups, ctx.eps = groups, eps
        s, b = mixed.shape[:2]
        d = table.size(-1)
        heads = mixed.size(-1) // d - 2 * groups
        query = mixed.new_empty(s, b, heads, d)
        key, value = (mixed.new_empty(s, b, groups, d) for _ in range(2))
        programs, sine_at, table, constants = _launch(mixed, table, groups, value_gain is not None)
        if programs:
            _forward[(programs,)](
                mixed, table, *_given(gains), query, key, value, s * b, b, sine_at, eps,
                **constants,
            )  # fmt: skip
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_results: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `mixed` and the weights."""
        mixed, table, *gains = ctx.saved_tensors
        s, b = mixed.shape[:2]
        groups, d = ctx.groups, table.size(-1)
        d_mixed = torch.empty_like(mixed)
        given = [t if t.stride(-1) == 1 else t.contiguous() for t in d_results]
        strides = [stride for t in given for stride in t.stride()[:3]]
        programs, sine_at, table, constants = _launch(mixed, table, groups, gains[2] is not None)
        sums = torch.empty(programs, d, dtype=torch.float32, device=mixed.device)
        if programs:
            _backward[(programs,)](
                *given, mixed, table, *_given(gains), d_mixed, sums, s * b, b, sine_at, ctx.eps,
                *strides, **constants,
            )  # fmt: skip
        of_member = sums.view(-1, groups, mixed.size(-1) // (groups * d), d).sum((0, 1))
        d_query = of_member[:-2].sum(0)
        d_value = None if gains[2] is None else of_member[-1]
        return d_mixed, None, d_query, of_member[-2], d_value, None, None


def _given(gains: Any) -> list[Tensor]:
    """The weights; in the place of the value's, where there are none, another, not read."""
    return [gains[0] if one is None else one for one in gains]


def _launch(
    mixed: Tensor, table: Tensor, groups: int, value: bool
) -> tuple[int, int, Tensor, dict[str, Any]]:
    """Programs, elements between the table's parts, the table, and the kernels' constants."""
    s, b, width = mixed.shape
    d = table.size(-1)
    if table.stride(1) != d or table.stride(-1) != 1:
        table = table.contiguous()
    tile, heads = tile_of(d), width // d
    constants = {
        "GROUPS": groups,
        "SHARED": heads // groups - 2,
        "HALF": d // 2,
        "VALUE": value,
        "BLOCK_T": tile.tokens,
        "BLOCK_HALF": tile.half,
        "num_warps": tile.warps,
    }
    return triton.cdiv(s * b, tile.tokens) * heads, table.stride(0), table, constants
