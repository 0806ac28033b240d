"""The fused operation as two Triton kernels, forward and backward.

Each row (token) is in one tile of a program; h is padded to a power of two in registers,
never in memory. Forward reads x and f once and writes x' and z once. Backward reads x, f and the
incoming gradients once, recomputes u, its normalised value and x' from them, and writes the two
gradients once.

Saved for the backward pass, besides the norm weights: x, which is the previous operation's x' and
so held anyway; f, h elements of its type per row; one fp32 statistic per row and norm.

The gradients of the norm weights are sums over all rows. A fixed number of programs per device each
add up their rows in a fixed order into a row of a buffer; one reduction follows. Without atomics,
two runs give the same bits.

Source of the backward formulas: y = n g, n = u r, r = (mean(u^2) + eps)^-1/2 gives

    dg = sum over rows of dy n,   du = r (dy g - n mean(dy g n)).

With y = x' and d its gradient through both paths, the outer norm's mean(d x') need not wait for
the inner norm's c = mean(dz g_in x' r_in): their chain gives mean(dx' x') + c eps r_in^2, so all
sums over a row are taken at once.
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

from keel_megatron.kernels import MAX_TRITON_HIDDEN_SIZE

_PROGRAMS_WITHOUT_GPU = 4


class Tile(NamedTuple):
    """Tiling of a kernel; `tools/bench/kernel.py --sweep` compares others on a device."""

    rows: int
    """Rows at a time in a program."""
    warps: int
    programs_per_sm: int = 0
    """Backward only: resident programs, each with its own sums of the weights' gradients."""
    stages: int = 1
    """Backward only: 2 = load the next tile into shared memory while this one is worked on."""


@triton.jit
def _load(ptr, at, mask, GIVEN: tl.constexpr):
    """fp32 values, 0 outside the mask; 0 where the tensor is not given."""
    if GIVEN:
        return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:  # noqa: RET505 - Triton takes one branch, and wants it so
        return 0.0


@triton.jit
def _rstd(u, eps, H: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(u * u, axis=1, keep_dims=True) / H + eps)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    f_ptr,
    outer_ptr,
    inner_ptr,
    x_new_ptr,
    z_ptr,
    rstd_ptr,  # [2, rows]: the outer norm's, the inner norm's
    rows,
    alpha,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    column = tl.arange(0, BLOCK_H)[None, :]
    in_column = column < H
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    in_row = row < rows
    at = row * H + column
    mask = in_row & in_column
    x_new = alpha * _load(x_ptr, at, mask, True) + _load(f_ptr, at, mask, True)
    if OUTER:
        rstd = _rstd(x_new, eps, H)
        tl.store(rstd_ptr + row, rstd, mask=in_row)
        x_new = x_new * rstd * _load(outer_ptr, column, in_column, True)
    tl.store(x_new_ptr + at, x_new, mask=mask)
    if INNER:
        rstd = _rstd(x_new, eps, H)
        tl.store(rstd_ptr + rows + row, rstd, mask=in_row)
        z = x_new * rstd * _load(inner_ptr, column, in_column, True)
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _inner_again(
    x_new_ptr,
    inner_ptr,
    rstd_ptr,  # [rows]: the inner norm's
    z_ptr,
    rows,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    column = tl.arange(0, BLOCK_H)[None, :]
    in_column = column < H
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    in_row = row < rows
    at = row * H + column
    mask = in_row & in_column
    rstd = _load(rstd_ptr, row, in_row, True)
    z = _load(x_new_ptr, at, mask, True) * rstd * _load(inner_ptr, column, in_column, True)
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(
    u,
    d,
    dz,
    outer,
    inner,
    outer_rstd,
    inner_rstd,
    eps,
    H: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile's du, and each element's share of the two weights' gradients (0 without the norm)."""
    of_outer = u * 0.0
    of_inner = u * 0.0
    n = u
    x_new = u
    if OUTER:
        n = u * outer_rstd
        x_new = n * outer
        mean = tl.sum(d * x_new, axis=1, keep_dims=True) / H
    if INNER:
        of_inner = dz * inner_rstd * x_new
        c = tl.sum(of_inner * inner, axis=1, keep_dims=True) / H
        squared_rstd = inner_rstd * inner_rstd
        d = d + dz * inner_rstd * inner - x_new * (c * squared_rstd)
        if OUTER:
            mean += c * (eps * squared_rstd)
    if OUTER:
        of_outer = d * n
        d = outer_rstd * (d * outer - n * mean)
    return d, of_outer, of_inner


@triton.jit(do_not_specialize=["rows", "tiles_per_program"])
def _backward(
    x_ptr,
    f_ptr,
    outer_ptr,
    inner_ptr,
    rstd_ptr,  # [2, rows], from the forward pass
    dx_new_ptr,
    dz_ptr,
    dx_ptr,
    df_ptr,
    d_weight_ptr,  # [2, programs, H]: of the outer, then of the inner norm weight
    rows,
    tiles_per_program,
    alpha,
    eps,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, BLOCK_H)[None, :]
    in_column = column < H
    outer = _load(outer_ptr, column, in_column, OUTER)
    inner = _load(inner_ptr, column, in_column, INNER)
    d_outer = tl.zeros((1, BLOCK_H), dtype=tl.float32)
    d_inner = tl.zeros((1, BLOCK_H), dtype=tl.float32)
    first = tl.program_id(0) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tl.cdiv(rows, BLOCK_R))
    for tile in tl.range(first, last, num_stages=STAGES):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
        in_row = row < rows
        at = row * H + column
        # Padding rows and columns are zero and add nothing.
        mask = in_row & in_column
        u = alpha * _load(x_ptr, at, mask, True) + _load(f_ptr, at, mask, True)
        d = _load(dx_new_ptr, at, mask, True)
        dz = _load(dz_ptr, at, mask, INNER)
        outer_rstd = _load(rstd_ptr, row, in_row, OUTER)
        inner_rstd = _load(rstd_ptr, rows + row, in_row, INNER)
        du, of_outer, of_inner = _gradients(
            u, d, dz, outer, inner, outer_rstd, inner_rstd, eps, H, OUTER, INNER
        )
        tl.store(dx_ptr + at, alpha * du, mask=mask)
        tl.store(df_ptr + at, du.to(df_ptr.dtype.element_ty), mask=mask)
        d_outer += tl.sum(of_outer, axis=0, keep_dims=True)
        d_inner += tl.sum(of_inner, axis=0, keep_dims=True)
    own = tl.program_id(0) * H + column
    tl.store(d_weight_ptr + own, d_outer, mask=in_column)
    tl.store(d_weight_ptr + tl.num_programs(0) * H + own, d_inner, mask=in_column)


class ScaledAddNorm(torch.autograd.Function):
    """kernels.reference.scaled_add_norm; the same arguments and results, differentiable once."""

    recomputable = 1
    """The output that `recompute` computes again: z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        alpha: float,
        outer_weight: Tensor | None,
        inner_weight: Tensor | None,
        eps: float,
        z_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """See `kernels.reference.scaled_add_norm`.

        Raises:
            ValueError: x is not fp32 or too wide.
        """
        h = x.size(-1)
        if x.dtype != torch.float32 or h > MAX_TRITON_HIDDEN_SIZE:
            raise ValueError(
                f"the Triton kernel needs an fp32 stream of at most {MAX_TRITON_HIDDEN_SIZE} "
                f"columns; this one is {x.dtype} with {h}: use backend='torch'"
            )
        x, f = x.contiguous(), f.contiguous()
        rows = x.numel() // h
        x_new = torch.empty_like(x)
        z = torch.empty_like(x, dtype=z_dtype) if inner_weight is not None else None
        rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        tile = forward_tile(h)
        if rows:
            _forward[(triton.cdiv(rows, tile.rows),)](
                x,
                f,
                outer_weight,
                inner_weight,
                x_new,
                z,
                rstd,
                rows,
                alpha,
                eps,
                **_constants(h, tile, outer_weight, inner_weight),
            )
        # x' is the next operation's x, and so held anyway; without z there may be none.
        ctx.save_for_backward(x, f, outer_weight, inner_weight, rstd, None if z is None else x_new)
        ctx.alpha, ctx.eps = alpha, eps
        return x_new, z

    @staticmethod
    def recompute(ctx: Any, out: Tensor) -> None:
        """Write z again, to the bit, into `out`: products of fp32 numbers that were kept."""
        _x, _f, _outer_weight, inner_weight, rstd, x_new = ctx.saved_tensors
        h = x_new.size(-1)
        rows, tile = x_new.numel() // h, forward_tile(h)
        if rows:
            constants = _constants(h, tile, None, None)
            del constants["OUTER"], constants["INNER"]
            grid = (triton.cdiv(rows, tile.rows),)
            _inner_again[grid](x_new, inner_weight, rstd[1], out, rows, **constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, f and the norm weights from those of x' and z; autograd gives both."""
        x, f, outer_weight, inner_weight, rstd, _x_new = ctx.saved_tensors
        h = x.size(-1)
        rows = x.numel() // h
        dx, df = torch.empty_like(x), torch.empty_like(f)
        tile = backward_tile(h)
        tiles = triton.cdiv(rows, tile.rows)
        programs = max(1, min(_resident_programs(x, tile), tiles))
        partial = torch.empty(2, programs, h, dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            x,
            f,
            outer_weight,
            inner_weight,
            rstd,
            dx_new.contiguous(),
            None if dz is None else dz.contiguous(),
            dx,
            df,
            partial,
            rows,
            triton.cdiv(tiles, programs),
            ctx.alpha,
            ctx.eps,
            STAGES=tile.stages,
            **_constants(h, tile, outer_weight, inner_weight),
        )
        d_outer, d_inner = partial.sum(1).unbind(0)
        return (
            dx,
            df,
            None,
            None if outer_weight is None else d_outer.to(outer_weight.dtype),
            None if inner_weight is None else d_inner.to(inner_weight.dtype),
            None,
            None,
        )


def forward_tile(h: int) -> Tile:
    """About 4096 elements, or one row: 32 a thread up to h = 2048, then 8 and up."""
    block = triton.next_power_of_2(h)
    return Tile(max(1, min(16, 4096 // block)), min(max(block // 256, 4), 16))


def backward_tile(h: int) -> Tile:
    """About 2048 elements or one row, 16 a thread.

    Chosen by what the compiler says for compute capability 9.0 and bf16 f and z: no register is
    spilled up to h = 4096; 3 programs fit a multiprocessor up to h = 1024, then 2, then 1. Where
    so few fit, the next row is prefetched into shared memory to keep loads in flight.
    """
    block = triton.next_power_of_2(h)
    if block <= 1024:
        return Tile(min(32, 2048 // block), 4, 3)
    if block <= 4096:
        return Tile(1, block // 512, 4096 // block, 2)
    return Tile(1, block // 512, 1)


def _resident_programs(x: Tensor, tile: Tile) -> int:
    """Programs of the backward pass: fixed per device, so that sums have a fixed order."""
    if not x.is_cuda:
        return _PROGRAMS_WITHOUT_GPU
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return tile.programs_per_sm * processors


def _constants(
    h: int, tile: Tile, outer_weight: Tensor | None, inner_weight: Tensor | None
) -> dict[str, Any]:
    return {
        "H": h,
        "BLOCK_H": triton.next_power_of_2(h),
        "BLOCK_R": tile.rows,
        "OUTER": outer_weight is not None,
        "INNER": inner_weight is not None,
        "num_warps": tile.warps,
    }
