"""Split and rotation of query, key and value as two Triton kernels, forward and backward.

`model.rotary.split_rotary` defines the operation. Every element is read once and written once:
forward from the fused tensor into query, key and value; backward from their gradients into that of
the fused tensor. A program has some tokens of one head and rotates the pairs (x_i, x_{i + d/2}); a
head of the value is copied. The arithmetic is fp32, and a result is rounded once.

Nothing is kept for the backward pass but the table.
"""

# Triton's functions take pointers, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16)


class Tile(NamedTuple):
    """Tiling of both kernels."""

    tokens: int
    """Tokens of one head in a program."""
    half: int
    """Power of two, at least d / 2."""
    warps: int = 4


@triton.jit
def _angles(table_ptr, position, in_token, column, in_column, HALF: tl.constexpr, sine_at):
    """Cosine and sine of the pairs' angles, fp32: the table's second half, where sine's sign is +.

    Positions are those of the table [2, s, d]; sine_at: elements between its two parts.
    """
    at = position * (2 * HALF) + HALF + column
    mask = in_token & in_column
    cos = tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(table_ptr + sine_at + at, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _place(
    tokens,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """What a program works on: one head, as a member of its group, of some tokens.

    The last result is where in [tokens, GROUPS, SHARED + 2, 2 HALF] the first halves are.
    """
    HEADS: tl.constexpr = GROUPS * (SHARED + 2)
    head = tl.program_id(0) % HEADS  # neighbours share the lines of a token
    group = (head // (SHARED + 2)).to(tl.int64)
    member = head % (SHARED + 2)
    token = (tl.program_id(0) // HEADS) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)[None, :]
    to = (token * HEADS + head) * (2 * HALF) + column
    return group, member, token, column, token < tokens, column < HALF, to


@triton.jit
def _load_pair(ptr, at, mask, HALF: tl.constexpr):
    one = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return one, two


@triton.jit
def _store_pair(ptr, at, one, two, mask, HALF: tl.constexpr):
    tl.store(ptr + at, one.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + at + HALF, two.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    mixed_ptr,  # [tokens, GROUPS, SHARED + 2, 2 HALF]; a token is (position, sequence)
    table_ptr,
    query_ptr,  # [tokens, GROUPS x SHARED, 2 HALF]
    key_ptr,  # [tokens, GROUPS, 2 HALF], as value
    value_ptr,
    tokens,
    batch,
    sine_at,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    group, member, token, column, in_token, in_column, to = _place(
        tokens, GROUPS, SHARED, HALF, BLOCK_T, BLOCK_HALF
    )
    mask = in_token & in_column
    one, two = _load_pair(mixed_ptr, to, mask, HALF)
    at_group = (token * GROUPS + group) * (2 * HALF) + column
    if member == SHARED + 1:
        _store_pair(value_ptr, at_group, one, two, mask, HALF)
    else:
        position = token // batch
        cos, sin = _angles(table_ptr, position, in_token, column, in_column, HALF, sine_at)
        turned_one = one * cos - two * sin
        turned_two = two * cos + one * sin
        if member == SHARED:
            _store_pair(key_ptr, at_group, turned_one, turned_two, mask, HALF)
        else:
            at = ((token * GROUPS + group) * SHARED + member) * (2 * HALF) + column
            _store_pair(query_ptr, at, turned_one, turned_two, mask, HALF)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    d_query_ptr,  # as in the forward pass, but at strides: (position, sequence, head)
    d_key_ptr,
    d_value_ptr,
    table_ptr,
    d_mixed_ptr,
    tokens,
    batch,
    sine_at,
    query_s,
    query_b,
    query_head,
    key_s,
    key_b,
    key_head,
    value_s,
    value_b,
    value_head,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    group, member, token, column, in_token, in_column, to = _place(
        tokens, GROUPS, SHARED, HALF, BLOCK_T, BLOCK_HALF
    )
    mask = in_token & in_column
    position = token // batch
    sequence = token % batch
    if member == SHARED + 1:
        at = position * value_s + sequence * value_b + group * value_head + column
        one, two = _load_pair(d_value_ptr, at, mask, HALF)
        _store_pair(d_mixed_ptr, to, one, two, mask, HALF)
    else:
        cos, sin = _angles(table_ptr, position, in_token, column, in_column, HALF, sine_at)
        if member == SHARED:
            at = position * key_s + sequence * key_b + group * key_head + column
            one, two = _load_pair(d_key_ptr, at, mask, HALF)
            _store_pair(d_mixed_ptr, to, one * cos + two * sin, two * cos - one * sin, mask, HALF)
        else:
            at = position * query_s + sequence * query_b + column
            at += (group * SHARED + member) * query_head
            one, two = _load_pair(d_query_ptr, at, mask, HALF)
            _store_pair(d_mixed_ptr, to, one * cos + two * sin, two * cos - one * sin, mask, HALF)


class SplitRotary(torch.autograd.Function):
    """model.rotary.split_rotary; the same arguments and results, differentiable once."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor, groups: int) -> tuple[Tensor, ...]:
        """See `model.rotary.split_rotary`.

        Raises:
            ValueError: the types are not supported or differ.
        """
        if mixed.dtype not in DTYPES or table.dtype != mixed.dtype:
            raise ValueError(
                f"the Triton kernel needs fp32 or bf16 and a table of the same type; these are "
                f"{mixed.dtype} and {table.dtype}: use backend='torch'"
            )
        ctx.save_for_backward(table)
        s, b = mixed.shape[:2]
        d = table.size(-1)
        heads = mixed.size(-1) // d - 2 * groups
        query = mixed.new_empty(s, b, heads, d)
        key, value = (mixed.new_empty(s, b, groups, d) for _ in range(2))
        results = (query, key, value)
        launch(_forward, (mixed.contiguous(),), table, results, results)
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, None, None]:
        """The gradient of `mixed`."""
        (table,) = ctx.saved_tensors
        s, b, groups, d = d_key.shape
        d_mixed = d_key.new_empty(s, b, (d_query.size(2) + 2 * groups) * d)
        # Attention's gradients may have another order of dimensions: they are read as they are.
        given = [t if t.stride(-1) == 1 else t.contiguous() for t in (d_query, d_key, d_value)]
        strides = [stride for t in given for stride in t.stride()[:3]]
        launch(_backward, tuple(given), table, (d_mixed,), (d_query, d_key, d_value), *strides)
        return d_mixed, None, None


def launch(
    kernel: Any,
    inputs: tuple[Tensor, ...],
    table: Tensor,
    outputs: tuple[Tensor, ...],
    parts: tuple[Tensor, Tensor, Tensor],
    *strides: int,
) -> None:
    """Launch a kernel over all tokens and heads.

    Args:
        kernel: `_forward` or `_backward`.
        inputs: what it reads.
        table: RotaryTable's, [2, s, 1, 1, d].
        outputs: what it writes.
        parts: query, key and value, or their gradients: the shapes.
        strides: those of the gradients, for `_backward`.
    """
    query, key, _value = parts
    s, b, groups, d = key.shape
    if table.stride(1) != d or table.stride(-1) != 1:
        table = table.contiguous()
    shared = query.size(2) // groups
    tile = tile_of(d)
    programs = triton.cdiv(s * b, tile.tokens) * groups * (shared + 2)
    if not programs:
        return
    kernel[(programs,)](
        *inputs,
        table,
        *outputs,
        s * b,
        b,
        table.stride(0),
        *strides,
        GROUPS=groups,
        SHARED=shared,
        HALF=d // 2,
        BLOCK_T=tile.tokens,
        BLOCK_HALF=tile.half,
        num_warps=tile.warps,
    )


def tile_of(head_dim: int) -> Tile:
    """About 1024 pairs, 8 a thread, or one token."""
    half = triton.next_power_of_2(head_dim // 2)
    return Tile(max(1, 1024 // half), half)
