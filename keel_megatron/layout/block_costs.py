"""Cost of a typical block of a residual rule, for one device and one micro-batch.

The costs of scaled adds and norms follow from the rule's columns (architecture/residual.py). The
symbols are those of costs.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

from keel_megatron.architecture.flops import attention_score_flops, block_forward_flops
from keel_megatron.architecture.parameters import row_parameters
from keel_megatron.architecture.residual import RULES, Reader, Rule, SubLayer
from keel_megatron.config.model import ModelConfig
from keel_megatron.layout import kernel_counts
from keel_megatron.layout.kernel_counts import Rows
from keel_megatron.layout.work import STREAM_BYTES, Cost, Execution, Kernel, Shape, Work

COSTS = Reader(
    "the planner's costs",
    (
        "alpha",
        "branch_factor",
        "branch_norm",
        "inner",
        "inner_factor",
        "outer_norm",
        "head_norms",
        "streams",
    ),
)
_ANY_FACTOR = 0.5


def typical_rows(model: ModelConfig) -> Rows:
    """The columns of the most common kind of block; on a tie, of that with the most norms.

    A block's kind is its attention, its FFN, and the attention of the next block. Where blocks
    differ, the plan treats all of them as the most common kind, except for parameter counts. What
    an `inner_factor` is does not change a cost, only that there is one.
    """
    return _typical_rows(RULES[model.residual], model)


@cache
def _typical_rows(_rule: Rule, model: ModelConfig) -> Rows:
    rows = [COSTS.sub_layer(l, model) for l in range(model.sub_layers)]
    rows = [
        row if row.inner_factor == 1.0 else replace(row, inner_factor=_ANY_FACTOR) for row in rows
    ]
    kinds = Counter(
        # The last block counts as if an identical block followed.
        (rows[l], rows[l + 1], rows[l + 2] if l + 2 < len(rows) else rows[l])
        for l in range(0, len(rows), 2)
    )
    return max(kinds, key=lambda kind: (kinds[kind], kernel_counts.weights(kind)))


def block_cost(shape: Shape, kernel: Kernel, execution: Execution) -> Cost:
    """Cost of a typical block.

    Args:
        shape: the device's share of a micro-batch.
        kernel: implementation of the scaled add + norms.
        execution: how the block's kernels are executed.
    """
    t, c, h, model = shape.tokens, shape.c, shape.model.hidden_size, shape.model
    rows = typical_rows(model)
    parameters = h * (2 * shape.attention + 2 * shape.groups) + 3 * h * shape.ffn
    forward, backward = _passes(shape, kernel, execution, rows, parameters)
    activations = _kept(shape, kernel, execution, rows)
    freed, light = _light(shape, kernel, execution, rows)
    return Cost(
        forward=forward,
        backward=backward,
        parameters=parameters,
        vector_parameters=sum(row_parameters(row, model) for row in rows[:2]),
        activation_bytes=activations,
        light_bytes=activations - freed,
        light=light,
        boundary_bytes=t * c * shape.h if rows[0].inner == "norm" else 0,
        recompute_bytes=t * (rows[0].streams * STREAM_BYTES + c) * shape.h,
        working_bytes=t * (2 * rows[0].streams * STREAM_BYTES * h + 3 * c * shape.ffn),
        execution=execution,
    )


def _passes(
    shape: Shape, kernel: Kernel, execution: Execution, rows: Rows, parameters: int
) -> tuple[Work, Work]:
    """Work of the forward and of the backward pass."""
    t, c, h, model = shape.tokens, shape.c, shape.model.hidden_size, shape.model
    a, g, f, tp = shape.attention, shape.groups, shape.ffn, shape.tp
    scores = attention_score_flops(model, shape.seq_length) * t / tp
    flops = block_forward_flops(model, shape.seq_length) * t / tp
    operands = t * c * (4 * h + 2 * a + 2 * g + 3 * f) + c * parameters
    moved = _moved(shape, rows, kernel, execution)
    strided = t * _strided(shape, execution)
    casts = _fp8_casts(shape, parameters) if execution.fp8 else (0, 0, 0, 0)
    # A product adds its weight's gradient to the fp32 sum, which it reads and writes after its own
    # work, in one wave of tiles; or it writes the gradient, and DDP adds it.
    direct = shape.adds_gradients(kernel, execution)
    gradients = 2 * STREAM_BYTES * parameters if direct else shape.gradient_bytes(parameters)
    kernels = _kernels(rows, kernel, execution, direct)
    # Halves of all-reduces: before and after each branch, and under SP the branch's input again.
    messages = 4 if tp > 1 else 0
    again = 2 if shape.h != h else 0
    forward = Work(
        flops=flops,
        attention_flops=scores,
        products=4,
        results=t * (a + 2 * g + 2 * f + 2 * h),
        matmul_bytes=operands,
        other_bytes=t * moved[0] + casts[0],
        strided_bytes=strided,
        communication_bytes=messages * shape.collective_bytes(),
        collectives=messages,
        kernels=kernels[0] + casts[2],
    )
    backward = Work(
        # Flash attention recomputes the scores: 5 products against 2 in the forward pass.
        flops=2 * flops + 0.5 * scores,
        attention_flops=2.5 * scores,
        products=8,
        results=t * (a + f + 2 * h) + parameters,
        matmul_bytes=2 * operands,
        other_bytes=t * moved[1] + gradients + casts[1],
        strided_bytes=strided,
        communication_bytes=(messages + again) * shape.collective_bytes(),
        collectives=messages + again,
        kernels=kernels[1] + casts[3],
    )
    return forward, backward


def _kernels(rows: Rows, kernel: Kernel, execution: Execution, direct: bool) -> tuple[int, int]:
    """Number of kernels, forward and backward, without fp8's casts."""
    return kernel_counts.total(
        kernel_counts.block(
            rows,
            compiled=execution.compiled,
            fused=kernel == "triton",
            rotary=_fused_rotary(execution),
            swiglu=_fused_swiglu(execution),
            direct=direct,
        )
    )


def _kept(shape: Shape, kernel: Kernel, execution: Execution, rows: Rows) -> int:
    """Bytes of activations that a block keeps for its backward pass."""
    c = shape.c
    kept = 4 * shape.heads  # attention's statistics
    kept += c * (2 * shape.attention + 2 * shape.groups)  # context, q, k, v
    kept += c * 3 * shape.ffn  # fc1's output, and fc2's input
    kept += _head_norms_bytes(shape, execution, rows) + _dropout_bytes(shape, kernel)
    joins = sum(_join_kept(shape, kernel, *one) for one in _joins(rows))
    return shape.tokens * kept + joins


_joins = kernel_counts.joins


def _light(shape: Shape, kernel: Kernel, execution: Execution, rows: Rows) -> tuple[int, Work]:
    """Bytes that light recomputation does not keep, and its work.

    Of a block: SwiGLU's output, and the inner norms' in front of both branches.
    """
    t, c, h, f = shape.tokens, shape.c, shape.h, shape.ffn
    inner = sum(row.inner == "norm" for row in rows[:2])
    # Under ZeRO 3, autograd functions of its module hooks stand between a block and the next.
    kept = int(shape.zero_3 and rows[0].inner == "norm")
    norms = inner - kept
    swiglu = _swiglu_moved(shape, execution)[0]
    if kernel == "triton":  # one kernel, x' to z
        moved, kernels = norms * (STREAM_BYTES + c) * h, norms
    else:
        cast = STREAM_BYTES + c if c != STREAM_BYTES else 0
        moved, kernels = norms * (4 * STREAM_BYTES + cast) * h, norms * (3 if cast else 2)
    kernels += 1 if _fused_swiglu(execution) else 2
    return t * c * (f + norms * h), Work(other_bytes=t * (swiglu + moved), kernels=kernels)


def join_bytes(hidden_size: int, c: int) -> tuple[int, int]:
    """As `kernels.bytes_per_token`, without importing torch, so that a plan starts fast."""
    return (2 * STREAM_BYTES + 2 * c) * hidden_size, (3 * STREAM_BYTES + 3 * c) * hidden_size


def _join_kept(shape: Shape, kernel: Kernel, row: SubLayer, following: SubLayer) -> int:
    """Bytes kept by one scaled add + norms, and by the product that reads its output."""
    t, h, c = shape.tokens, shape.h, shape.c
    # In fp32 without a norm in between, the next branch's input is the stream itself.
    copied = c != STREAM_BYTES or following.inner != "none"
    # N_b keeps the branch, in fp32.
    branch = row.branch_norm * (t * STREAM_BYTES * h + shape.statistic_bytes())
    # The weight of the next norm or vector times its factor, which is a tensor of its own.
    scaled = STREAM_BYTES * shape.model.hidden_size * (following.inner_factor != 1.0)
    if row.streams > 1:  # the streams, the branch, what is read of them, the norm of that
        joined = t * ((row.streams + 1) * STREAM_BYTES + 2 * c) * h + shape.statistic_bytes()
        return joined + branch + scaled
    if kernel == "triton":  # x, f, z; both statistics
        joined = t * (STREAM_BYTES + c + c * copied) * h + 2 * shape.statistic_bytes()
        return joined + branch + scaled
    # Every norm keeps its input; with two norms, the inner one's input is the outer one's output.
    norms = int(row.outer_norm) + int(following.inner == "norm")
    inputs = norms + int(following.inner == "vector")
    joined = inputs * t * STREAM_BYTES * h + norms * shape.statistic_bytes() + t * c * h
    return joined + branch + scaled


def _head_norms_bytes(shape: Shape, execution: Execution, rows: Rows) -> int:
    """Bytes per token kept by the norms of heads: linear_qkv's output, and a number a head.

    The fused kernel computes those numbers again.
    """
    if not (normed := rows[0].head_norms):
        return 0
    a, g, groups = shape.attention, shape.groups, shape.groups // shape.model.head_dim
    numbers = 0 if _fused_rotary(execution) else shape.heads + (len(normed) - 1) * groups
    return shape.c * (a + 2 * g) + STREAM_BYTES * numbers


def _head_norms_moved(shape: Shape, execution: Execution, rows: Rows) -> tuple[int, int]:
    """Bytes per token that the norms of heads move besides the rotation.

    The fused kernel reads linear_qkv's output again in the backward pass; torch's operators are
    those of kernels/head_norms.py.
    """
    if not (normed := rows[0].head_norms):
        return 0, 0
    c, elements = shape.c, shape.attention + (len(normed) - 1) * shape.groups
    if _fused_rotary(execution):
        return 0, c * elements
    copied = 2 * c * shape.groups if normed == "qk" else 0
    # Forward: read by the cast, the statistics and two products, and copied back. Backward: both
    # casts, the normalised heads, and nine operators.
    forward = (2 * c + 7 * STREAM_BYTES) * elements + copied
    return forward, (3 * c + 18 * STREAM_BYTES) * elements + copied


def _dropout_bytes(shape: Shape, kernel: Kernel) -> int:
    """Kept a token by both branches' dropout: a mask of a byte an element on CUDA.

    On a CPU torch keeps its noise in the branch's type. Attention's kernel draws its mask again.
    """
    if not shape.model.dropout:
        return 0
    return 2 * shape.h * (1 if kernel == "triton" else shape.c)


def _moved(shape: Shape, rows: Rows, kernel: Kernel, execution: Execution) -> tuple[float, float]:
    """Bytes per token moved by element-wise kernels, forward and backward.

    The bytes of attention's operands are part of the rate of its kernel.
    """
    c, a, g = shape.c, shape.attention, shape.groups
    fused = kernel == "triton" or execution.compiled
    joins = [_join_moved(shape, one, fused) for one in _joins(rows)]
    forward, backward = (sum(way) for way in zip(*joins, strict=True))
    if execution.compiled:
        # Rotary in one pass each; the gradients of norm weights read their operands again.
        forward += 2 * c * (a + g)
        backward += 2 * c * (a + 2 * g) + 2 * 3 * STREAM_BYTES * shape.h
    elif _fused_rotary(execution):  # every element read and written once
        forward += 2 * c * (a + 2 * g)
        backward += 2 * c * (a + 2 * g)
    swiglu, heads = _swiglu_moved(shape, execution), _head_norms_moved(shape, execution, rows)
    return forward + swiglu[0] + heads[0], backward + swiglu[1] + heads[1]


def _swiglu_moved(shape: Shape, execution: Execution) -> tuple[int, int]:
    """Bytes per token of SwiGLU: one kernel each way, or torch's operators (kernels/swiglu.py)."""
    one = shape.c * shape.ffn
    return (3 * one, 5 * one) if _fused_swiglu(execution) else (5 * one, 11 * one)


def _fused_swiglu(execution: Execution) -> bool:
    """Whether SwiGLU is one kernel each way."""
    return "swiglu" in execution.triton or execution.compiled


def _strided(shape: Shape, execution: Execution) -> int:
    """Bytes per token of the rotary embedding in torch's operators, in each pass.

    A product, and two halves added to it; value is copied.
    """
    if execution.compiled or _fused_rotary(execution):
        return 0
    return shape.c * (5 * (shape.attention + shape.groups) + 2 * shape.groups)


def _fused_rotary(execution: Execution) -> bool:
    """Whether split and rotation are one kernel each way."""
    return "rotary" in execution.triton and not execution.compiled


def _join_moved(shape: Shape, pair: tuple[SubLayer, SubLayer], fused: bool) -> tuple[float, float]:
    """Bytes per token of one scaled add + norms: one kernel each way, or torch's operators.

    An operator reads its operands and writes its result. Forward: the sum 10 bytes per element in
    bf16, a norm 28 (squares 8, their sum 4, two products of 8), the cast 6. Backward: a norm 56,
    the sum 12, three casts and products 20.
    """
    row, following = pair
    h, c = shape.h, shape.c
    if row.streams > 1:  # operators: the sums of all streams, what is read of them, its norm
        return (20 * row.streams + 44) * h, (40 * row.streams + 80) * h
    norms = int(row.outer_norm) + int(following.inner == "norm")
    forward, backward = join_bytes(h, c)
    if not fused:
        forward, backward = (16 + 28 * norms) * h, (32 + 56 * norms) * h
    if following.inner != "norm":  # the cast, of a product with the vector
        vector = 2 * STREAM_BYTES if following.inner == "vector" else 0
        forward += (STREAM_BYTES + vector) * h
        backward += (3 * STREAM_BYTES + 2 * vector) * h
    if row.branch_norm:  # to fp32, normalised, back
        norm = (4, 6) if fused else (9, 16)
        forward += (2 * c + norm[0] * STREAM_BYTES) * h
        backward += (2 * c + norm[1] * STREAM_BYTES) * h
    if row.branch_factor != 1.0:
        forward, backward = forward + 2 * c * h, backward + 2 * c * h
    return forward, backward


def _fp8_casts(shape: Shape, parameters: int) -> tuple[int, int, int, int]:
    """Bytes and kernels, forward and backward, of the fp8 casts of the four products' operands.

    A cast reads its operand once for the maximum, then reads it and writes it twice, once
    transposed.
    """
    h, a, g, f = shape.model.hidden_size, shape.attention, shape.groups, shape.ffn
    inputs, gradients = h + a + h + f, (a + 2 * g) + h + 2 * f + h
    cast = 2 + 2 + 2
    forward, backward = cast * (shape.tokens * inputs + parameters), cast * shape.tokens * gradients
    return forward, backward, 16, 8
