"""Costs of the embedding, a block and the head, for one device and one micro-batch.

All values are for one device and one micro-batch of `training.micro_batch_size` sequences:
t = s x b tokens. c is the size of the compute type (2 or 4 bytes), h the hidden size, f the FFN's,
a heads and g query groups of width d. Under tensor parallelism a, g, f and the vocabulary are
divided by TP; under sequence parallelism, so are tensors with h elements per token.

Activations are counted by storage, as PyTorch frees them; test_activations.py compares the counts
with autograd's saved tensors.
"""

from __future__ import annotations

from dataclasses import replace

from keel_megatron.architecture.flops import head_forward_flops
from keel_megatron.architecture.residual import streams
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.block_costs import block_cost
from keel_megatron.layout.document_costs import with_documents
from keel_megatron.layout.work import (
    STREAM_BYTES,
    Cost,
    Costs,
    Execution,
    Kernel,
    Shape,
    Work,
)

HEAD_KERNELS, FUSED_HEAD_KERNELS, EMBEDDING_KERNELS = 8, 5, 4
"""Approximate number of kernels of a forward pass; the head's backward pass has twice as many.
Fused: softmax and loss are Triton kernels. `kernel_counts.py` counts those of a block."""

SEED_BYTES = 2 * 512
"""Kept by attention on CUDA: its dropout's seed and offset, each an allocation of its own."""


def model_costs(config: RunConfig, kernel: Kernel = "triton") -> Costs:
    """Costs of the embedding, a block and the head on one device of a run.

    Args:
        config: the run; model, seq_length, micro_batch_size, TP, SP and precision matter.
        kernel: whether the operations that `kernels.triton` names are Triton kernels.
    """
    shape, execution = Shape.of(config), Execution.of(config, kernel)
    norms: Kernel = "triton" if "norm" in execution.triton else "torch"
    block = block_cost(shape, norms, execution)
    if kernel == "triton":
        kept = _attention_kept(shape)
        block = replace(
            block,
            activation_bytes=block.activation_bytes + kept,
            light_bytes=block.light_bytes + kept,
        )
    return Costs(
        embedding=_embedding(shape, kernel),
        block=with_documents(block, config, kernel),
        head=_head(shape, kernel, in_place="cross_entropy" in execution.triton),
        muon_bytes=2 if kernel == "triton" else 4,
    )


def _attention_kept(shape: Shape) -> int:
    """Bytes that a block's attention keeps on CUDA alone.

    In fp32, key and value are repeated for every head (model/attention_kernel.py).
    """
    repeated = shape.attention - shape.groups if shape.c == STREAM_BYTES else 0
    return SEED_BYTES + 2 * shape.tokens * STREAM_BYTES * repeated


def head_pieces(config: RunConfig) -> int:
    """Number of pieces in which a micro-batch goes through the output layer and the loss."""
    return Shape.of(config).pieces


def _embedding(shape: Shape, kernel: Kernel) -> Cost:
    """Lookup in the embedding table, a cast to fp32, dropout, norm; the gradient is dense."""
    t, c, h = shape.tokens, shape.c, shape.model.hidden_size
    parameters = shape.vocabulary * h
    reduce = shape.collective_bytes() * STREAM_BYTES / c
    moved = t * (3 * c * h + STREAM_BYTES * h)
    kept = t * (1 + 8) if shape.tp > 1 else 0
    if shape.model.dropout:  # its mask; a CPU keeps the noise in the stream's type
        kept += t * shape.h * (1 if kernel == "triton" else STREAM_BYTES)
    norm = int(shape.model.embedding_norm)  # of the fp32 stream, which it keeps
    kept += norm * (t * STREAM_BYTES * shape.h + shape.statistic_bytes())
    moved += norm * 3 * STREAM_BYTES * t * shape.h
    copies = streams(shape.model)
    if copies > 1:
        moved += (1 + copies) * STREAM_BYTES * t * shape.h
    return Cost(
        forward=Work(
            other_bytes=moved,
            communication_bytes=reduce,
            collectives=int(shape.tp > 1),
            kernels=EMBEDDING_KERNELS + norm + int(copies > 1),
        ),
        backward=Work(
            other_bytes=moved + shape.gradient_bytes(parameters),
            kernels=EMBEDDING_KERNELS + 3 * norm + int(copies > 1),
        ),
        parameters=parameters,
        vector_parameters=norm * h,
        activation_bytes=kept,
        recompute_bytes=kept,
        working_bytes=parameters * c + t * c * h,
    )


def _head(shape: Shape, kernel: Kernel, *, in_place: bool) -> Cost:
    """Final norm, output layer and loss in pieces (`kernels/cross_entropy.py`).

    Args:
        shape: the device's share of a micro-batch.
        kernel: of the device.
        in_place: whether the gradient replaces the logits, in the compute type.
    """
    t, c, h, v = shape.tokens, shape.c, shape.model.hidden_size, shape.vocabulary
    vectors = h if shape.model.final_norm else 0
    pieces = shape.pieces
    again = int(pieces > 1)  # the pieces' logits in the backward pass
    flops = head_forward_flops(shape.model, v) * t
    operands = c * (t * (h + v) + pieces * v * h)
    norm = t * (STREAM_BYTES + c) * shape.h
    loss = _loss_bytes(shape, kernel, in_place)
    kernels = (FUSED_HEAD_KERNELS if in_place else HEAD_KERNELS) * pieces
    kept = t * c * shape.h
    if vectors:
        kept += t * STREAM_BYTES * shape.h
        kept += shape.statistic_bytes()
    own = v * h
    # The input of the output layer, or its gradient.
    message = shape.collective_bytes() if shape.tp > 1 else 0.0
    tied_here = shape.model.tie_embeddings and shape.pipeline == 1
    return Cost(
        forward=Work(
            flops=flops,
            products=pieces,
            results=t * v,
            matmul_bytes=operands,
            other_bytes=norm + loss[0],
            communication_bytes=message,
            collectives=3 * int(shape.tp > 1),  # two of a number or two a row
            kernels=kernels,
        ),
        backward=Work(
            flops=(2 + again) * flops,
            products=(2 + again) * pieces,
            results=again * t * v + t * h + pieces * own,
            # Every piece is added to the fp32 sum by the product itself.
            matmul_bytes=(2 + again) * operands + 2 * STREAM_BYTES * pieces * own,
            other_bytes=2 * norm + loss[1],
            communication_bytes=message,
            collectives=int(shape.tp > 1),
            kernels=2 * kernels,
        ),
        parameters=0 if tied_here else own,
        vector_parameters=vectors,
        activation_bytes=kept,
        recompute_bytes=kept,
        working_bytes=_head_working(shape, kernel, in_place=in_place),
        logits_bytes=t * _head_kept(shape, in_place),
    )


def _loss_bytes(shape: Shape, kernel: Kernel, in_place: bool) -> tuple[int, int]:
    """Bytes moved by softmax, loss and the logits' gradient, forward and backward."""
    c, logits = shape.c, shape.tokens * shape.vocabulary
    if in_place:  # read; read and replaced
        return c * logits, 2 * c * logits
    # Softmax or exp, and the product with the losses' gradients.
    one = 2 * STREAM_BYTES
    # Under bf16 to fp32 and back; on CUDA the product itself writes fp32.
    back = c + STREAM_BYTES if c != STREAM_BYTES else 0
    wide = STREAM_BYTES - c if kernel == "triton" else back
    again = int(shape.pieces > 1)
    return (one + wide) * logits, (2 * one + back + again * wide) * logits


def _head_kept(shape: Shape, in_place: bool) -> int:
    """Bytes per token kept by the loss.

    Labels; under TP which are here; under TP or with a z-loss a factor of every row; of one piece
    the log-softmax, or in place the logits, and then every row's log-sum-exp.
    """
    factor = STREAM_BYTES if shape.tp > 1 or shape.z_loss else 0
    numbers = 8 + int(shape.tp > 1) + factor + (STREAM_BYTES if in_place else 0)
    each = shape.c if in_place else STREAM_BYTES
    return numbers + (each * shape.vocabulary if shape.pieces == 1 else 0)


def _head_working(shape: Shape, kernel: Kernel, *, in_place: bool) -> int:
    """Temporary memory in the head: logits besides their softmax, or gradients.

    And four fp32 numbers a token: the losses, as the head computes and as it returns them, their
    gradient, and what it adds at the labels.
    """
    t, c, h, v = shape.tokens, shape.c, shape.model.hidden_size, shape.vocabulary
    piece, own, bf16 = shape.rows * v, v * h, shape.c != STREAM_BYTES
    whole = shape.rows == t
    logits = STREAM_BYTES * piece * (1 if whole else 2)  # of one piece the softmax is what is kept
    held = STREAM_BYTES * own if shape.returned and not whole else 0  # the fp32 sum of the pieces
    # The weight's gradient, where the product does not accumulate it.
    by_itself = (shape.returned and (whole or bf16)) or (bf16 and kernel == "torch")
    product = c * own if by_itself else 0
    d_logits = c * piece if bf16 or not whole else 0
    d_input, numbers = t * c * h, 4 * 4 * t
    if in_place:
        logits = 0 if whole else c * piece
        return numbers + max(logits, d_input + held + logits + product)
    backward = d_input + held + max(0 if whole else logits, d_logits + product)
    return numbers + max(logits, backward)
