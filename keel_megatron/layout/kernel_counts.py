"""Number of CUDA kernels of a block, by part.

Counted from the code for bf16, one device per stage and the Megatron engine; `make bench-gpu`
counts them in a trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from keel_megatron.architecture.residual import SubLayer


@dataclass(frozen=True)
class KernelCount:
    """Kernels of one part of a block."""

    part: str
    forward: int
    backward: int
    what: str


Rows = tuple[SubLayer, SubLayer, SubLayer]
"""A block's attention and FFN, and the attention of the next block."""


def joins(rows: Rows) -> tuple[tuple[SubLayer, SubLayer], ...]:
    """The two scaled adds of a block: (the added sub-layer, the next sub-layer)."""
    return (rows[0], rows[1]), (rows[1], rows[2])


def weights(rows: Rows) -> int:
    """Number of norm weights and learned vectors of a block."""
    return sum(
        int(row.inner != "none")
        + int(row.streams > 1)
        + int(row.branch_norm)
        + int(row.outer_norm)
        + len(row.head_norms)
        for row in rows[:2]
    )


def block(
    rows: Rows,
    *,
    compiled: bool = False,
    fused: bool = True,
    rotary: bool = True,
    swiglu: bool = True,
    direct: bool | None = None,
) -> tuple[KernelCount, ...]:
    """Kernels of a block, by part.

    Args:
        rows: the columns of its rule.
        compiled: count for `kernels.compile`.
        fused: whether scaled add and norms are one kernel or torch's operators.
        rotary: whether split and rotation are one kernel or torch's operators.
        swiglu: whether SwiGLU is one kernel or torch's operators.
        direct: whether products add to the sums of the weights' gradients; None: unless compiled.
    """
    direct = not compiled if direct is None else direct
    swiglu = swiglu or compiled
    return tuple(_parts(rows, compiled, fused or compiled, rotary, swiglu, direct))


def _parts(
    rows: Rows, compiled: bool, fused: bool, rotary: bool, swiglu: bool, direct: bool
) -> Iterator[KernelCount]:
    yield KernelCount(
        "products", 4, 8, "qkv, proj, fc1, fc2; backward one each for input and weight"
    )
    if compiled:
        yield KernelCount("rotary", 2, 2, "query and key; backward one tensor, key's part apart")
    elif rotary:
        yield KernelCount("rotary", 1, 1, "split and rotation of query, key and value")
    else:
        yield KernelCount(
            "rotary", 7, 7, "query and key a product and two halves each; value copied"
        )
    if rows[0].head_norms and rotary and not compiled:
        yield KernelCount("norms of heads", 0, 2, "in the rotation; sums for the weights")
    elif normed := rows[0].head_norms:
        copied = int(normed == "qk")
        yield KernelCount(
            "norms of heads",
            10 + copied,
            13 + copied,
            "the weights joined, a cast, the statistics in five operators, two products, back; "
            "backward the same again, and sums for the weights",
        )
    yield KernelCount(
        "attention",
        1,
        6,
        "forward the kernel; backward row sums, the kernel, a cast, sums of key and value over "
        "their group, zeroing a buffer",
    )
    if swiglu:
        yield KernelCount("SwiGLU", 1, 1, "fused")
    else:
        yield KernelCount("SwiGLU", 2, 4, "silu and products; backward silu's gradient too")
    each = [_join(*one, compiled, fused) for one in joins(rows)]
    forward, backward = (sum(way) for way in zip(*each, strict=True))
    yield KernelCount(
        "joins",
        forward,
        backward,
        "fused; backward a pass for the stream, one for the norm weights in two steps"
        if compiled
        else "the fused kernel twice; backward also the norm weights' partial sums"
        if fused
        else "the sum, seven operators a norm, a cast; backward eight a norm, and four",
    )
    yield KernelCount(
        "gradient sums",
        0,
        weights(rows) + (0 if direct else 4),
        f"DDP adds those of {'' if direct else 'four matrices and '}{weights(rows)} norm weights "
        "to the fp32 gradients",
    )


def _join(row: SubLayer, following: SubLayer, compiled: bool, fused: bool) -> tuple[int, int]:
    forward, backward = _sum_and_norms(row, following, compiled, fused)
    scaled = int(following.inner_factor != 1.0)  # the next norm's weight times its factor
    if row.branch_norm:
        norm = (1, 3) if compiled else _branch_norm(fused)
        forward, backward = forward + norm[0], backward + norm[1]
    return forward + scaled, backward + scaled


def _branch_norm(fused: bool) -> tuple[int, int]:
    """N_b, cast to fp32 and back: torch's kernel on CUDA, or seven and eight operators."""
    return (3, 5) if fused else (9, 10)


def _sum_and_norms(
    row: SubLayer, following: SubLayer, compiled: bool, fused: bool
) -> tuple[int, int]:
    if row.streams > 1:  # operators: two products, the branch added; the norm
        return (4, 10) if compiled else (12, 20)
    if compiled:
        return 1, 4
    norms = int(row.outer_norm) + int(following.inner == "norm")
    forward, backward = (1, 2) if fused else (2 + 7 * norms, 4 + 8 * norms)
    if following.inner != "norm":  # a product with the vector; the cast to the compute type
        own = 1 + int(following.inner == "vector")
        forward, backward = forward + own, backward + 1 + own
    factor = int(row.branch_factor != 1.0)
    return forward + factor, backward + factor


def total(parts: tuple[KernelCount, ...]) -> tuple[int, int]:
    """Total kernels of a block, forward and backward."""
    return sum(part.forward for part in parts), sum(part.backward for part in parts)
