"""What an embedding, a block and the head cost one device for one micro-batch.

All figures are those of one device and of one micro-batch of `training.micro_batch_size` sequences:
t = s x b tokens. c is the size of the compute type (2 or 4 bytes), h the hidden size, f the FFN's,
a heads and g query groups of width d. Under tensor parallelism a, g, f and the vocabulary are
divided by TP, and under sequence parallelism so is whatever holds h elements a token.

What a block keeps is counted by storages, as PyTorch frees them; test_activations.py holds the
counts against autograd's own saved tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel_megatron.config.model import ModelConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.partition import launches
from keel_megatron.partition.devices import Device
from keel_megatron.partition.flops import (
    attention_score_flops,
    block_forward_flops,
    block_vector_parameters,
    head_forward_flops,
)

Kernel = Literal["triton", "torch"]
"""How the fused scaled add + RMSNorm is done: one kernel (CUDA), or torch's operators (CPU)."""

STREAM_BYTES = 4
"""The residual stream is fp32."""

HEAD_KERNELS, EMBEDDING_KERNELS = 8, 4
"""Kernels that a forward pass launches, roughly; the head's backward pass launches twice as many.
A block's are counted in `launches.py`."""


@dataclass(frozen=True)
class Work:
    """One pass over one micro-batch."""

    flops: float = 0.0
    """Of matrix products, as the hardware does them."""
    matmul_bytes: float = 0.0
    """Operands and results of matrix products."""
    other_bytes: float = 0.0
    """Moved by everything else: norms, rotary embedding, SwiGLU, softmax, gradient sums."""
    communication_bytes: float = 0.0
    """Sent by this device to its tensor-parallel group."""
    collectives: int = 0
    """Messages of the tensor-parallel group."""
    kernels: int = 0
    """Kernels launched."""


@dataclass(frozen=True)
class Cost:
    """What one embedding, block or head costs one device."""

    forward: Work
    backward: Work
    parameters: int
    """Weights on this device, of the compute type."""
    vector_parameters: int
    """Gains on this device, always fp32."""
    activation_bytes: int
    """Kept from the forward to the backward pass of a micro-batch (the head: without logits)."""
    recompute_bytes: int
    """The same when the block is computed again in the backward pass."""
    working_bytes: int
    """Temporary, besides that, in the heavier of both passes."""
    logits_bytes: int = 0
    """Kept by the loss for the backward pass: a type of activation of its own."""


@dataclass(frozen=True)
class Costs:
    """The three kinds of pieces that a stage is made of."""

    embedding: Cost
    block: Cost
    """Any block but the first, which has a norm less under Keel."""
    head: Cost
    """Final norm, output projection and loss."""


def model_costs(config: RunConfig, kernel: Kernel = "triton") -> Costs:
    """The costs of a run's pieces on one of its devices.

    Args:
        config: the run; model, seq_length, micro_batch_size, TP, SP and precision matter.
        kernel: how scaled add + norm are done there.
    """
    shape = _Shape.of(config)
    return Costs(
        embedding=_embedding(shape), block=_block(shape, kernel), head=_head(shape, kernel)
    )


def head_pieces(config: RunConfig) -> int:
    """In how many pieces a micro-batch goes through the output layer and the loss."""
    return _Shape.of(config).pieces


@dataclass(frozen=True)
class _Shape:
    """One device's share of the shapes of a micro-batch."""

    model: ModelConfig
    seq_length: int
    tokens: int
    c: int
    tp: int
    h: int
    """Hidden size h; h/TP under SP, where a device has so many elements per token on average."""
    attention: int
    """a d / TP."""
    groups: int
    """g d / TP."""
    heads: int
    """a / TP."""
    ffn: int
    vocabulary: int
    pipeline: int
    rows: int
    """Tokens whose logits exist at once."""
    returned: bool
    """Whether weights' gradients leave their backward pass, as the DeepSpeed engine has it."""

    @classmethod
    def of(cls, config: RunConfig) -> _Shape:
        """The sizes of a run."""
        model, tp = config.model, config.parallel.tensor
        seq_length = config.data.seq_length
        tokens = seq_length * config.training.micro_batch_size
        vocabulary = config.data.vocab_size // tp
        return cls(
            model=model,
            seq_length=seq_length,
            tokens=tokens,
            c=2 if config.training.precision == "bf16" else 4,
            tp=tp,
            h=model.hidden_size // (tp if config.parallel.sequence else 1),
            attention=model.num_attention_heads * model.head_dim // tp,
            groups=model.query_groups * model.head_dim // tp,
            heads=model.num_attention_heads // tp,
            ffn=model.ffn_hidden_size // tp,
            vocabulary=vocabulary,
            pipeline=config.parallel.pipeline,
            rows=min(tokens, config.kernels.rows_at_once(vocabulary)),
            returned=config.training.engine == "deepspeed",
        )

    @property
    def pieces(self) -> int:
        """In how many pieces the tokens go through the head."""
        return -(-self.tokens // self.rows)

    def collective_bytes(self) -> float:
        """What a device sends for one all-gather or reduce-scatter of whole activations."""
        return self.tokens * self.model.hidden_size * self.c * (self.tp - 1) / self.tp

    def statistic_bytes(self) -> int:
        """One norm's 1 / rms of every token."""
        return 4 * self.tokens * self.h // self.model.hidden_size

    def gradient_bytes(self, parameters: int) -> int:
        """Write a gradient in the compute type, and add it to the fp32 one."""
        return parameters * (2 * self.c + 8)


def _embedding(shape: _Shape) -> Cost:
    """Rows of the table, cast to the stream; its gradient is dense."""
    t, c, h = shape.tokens, shape.c, shape.model.hidden_size
    parameters = shape.vocabulary * h
    reduce = shape.collective_bytes() * STREAM_BYTES / c
    moved = t * (3 * c * h + STREAM_BYTES * h)
    return Cost(
        forward=Work(
            other_bytes=moved,
            communication_bytes=reduce,
            collectives=int(shape.tp > 1),
            kernels=EMBEDDING_KERNELS,
        ),
        backward=Work(
            other_bytes=moved + shape.gradient_bytes(parameters), kernels=EMBEDDING_KERNELS
        ),
        parameters=parameters,
        vector_parameters=0,
        activation_bytes=t * (1 + 8) if shape.tp > 1 else 0,
        recompute_bytes=t * (1 + 8) if shape.tp > 1 else 0,
        working_bytes=parameters * c,
    )


def _norms(model: ModelConfig) -> tuple[bool, bool]:
    """Whether a sub-layer has an inner norm and an outer norm (model/residual.py), as most do."""
    inner = model.residual in ("keel", "pre_ln", "mix_ln")
    outer = model.residual not in ("pre_ln", "mix_ln", "hybrid_norm")
    return inner, outer


def _join_bytes(shape: _Shape, kernel: Kernel) -> int:
    """Kept by one scaled add + norms, and by the product that reads the next branch's input."""
    inner, outer = _norms(shape.model)
    t, h, c = shape.tokens, shape.h, shape.c
    if kernel == "triton":  # x, f, z; both statistics
        return t * (STREAM_BYTES + 2 * c) * h + 2 * shape.statistic_bytes()
    # Every norm keeps its input; where there are two, the inner one's is the outer one's result.
    norms = int(inner) + int(outer)
    return norms * (t * STREAM_BYTES * h + shape.statistic_bytes()) + t * c * h


def join_bytes(hidden_size: int, c: int) -> tuple[int, int]:
    """What `kernels.bytes_per_token` counts, without torch: a plan starts in no time."""
    return (2 * STREAM_BYTES + 2 * c) * hidden_size, (3 * STREAM_BYTES + 3 * c) * hidden_size


def _block(shape: _Shape, kernel: Kernel) -> Cost:
    t, c, h, model = shape.tokens, shape.c, shape.model.hidden_size, shape.model
    a, g, f, tp = shape.attention, shape.groups, shape.ffn, shape.tp
    parameters = h * (2 * a + 2 * g) + 3 * h * f
    scores = attention_score_flops(model, shape.seq_length) * t / tp
    flops = block_forward_flops(model, shape.seq_length) * t / tp
    operands = t * c * (4 * h + 2 * a + 2 * g + 3 * f) + c * parameters
    kept = 4 * shape.heads  # attention's statistics
    kept += c * (2 * a + 2 * g)  # context, q, k, v
    kept += c * 3 * f  # fc1's output, and fc2's input
    join_forward, join_backward = join_bytes(shape.h, c)
    rotary = 5 * c * (a + g) + 2 * c * g  # a product, two halves added to it; value copied
    attention = c * (4 * a + 2 * g)  # and its result laid out for the next product
    block_kernels = launches.total(launches.BLOCK)
    # Halves of all-reduces: before and after each branch, and under SP the branch's input again.
    forward_messages = 4 if tp > 1 else 0
    backward_messages = forward_messages + (2 if shape.h != h else 0)
    return Cost(
        forward=Work(
            flops=flops,
            matmul_bytes=operands,
            other_bytes=t * (2 * join_forward + rotary + attention + 3 * c * f),
            communication_bytes=forward_messages * shape.collective_bytes(),
            collectives=forward_messages,
            kernels=block_kernels[0],
        ),
        backward=Work(
            # Flash attention computes the scores again: 5 products for the forward pass's 2.
            flops=2 * flops + 0.5 * scores,
            matmul_bytes=2 * operands,
            other_bytes=t * (2 * join_backward + rotary + 2 * attention + 5 * c * f)
            + shape.gradient_bytes(parameters),
            communication_bytes=backward_messages * shape.collective_bytes(),
            collectives=backward_messages,
            kernels=block_kernels[1],
        ),
        parameters=parameters,
        vector_parameters=block_vector_parameters(model, 1),
        activation_bytes=t * kept + 2 * _join_bytes(shape, kernel),
        recompute_bytes=t * (STREAM_BYTES + c) * shape.h,
        working_bytes=t * (2 * STREAM_BYTES * h + 3 * c * f),
    )


def _head(shape: _Shape, kernel: Kernel) -> Cost:
    """Final norm, and output projection and loss in pieces (`kernels/cross_entropy.py`)."""
    t, c, h, v = shape.tokens, shape.c, shape.model.hidden_size, shape.vocabulary
    vectors = h if shape.model.final_norm else 0
    pieces = shape.pieces
    again = int(pieces > 1)  # the pieces' logits in the backward pass
    flops = head_forward_flops(shape.model, v) * t
    operands = c * (t * (h + v) + pieces * v * h)
    norm = t * (STREAM_BYTES + c) * shape.h
    # Softmax or exp, and the product with the losses' gradients; under bf16 to fp32 and back.
    one, cast = 2 * STREAM_BYTES * t * v, (c + STREAM_BYTES) * t * v if c != STREAM_BYTES else 0
    kept = t * c * shape.h
    if vectors:
        kept += t * STREAM_BYTES * shape.h
        kept += shape.statistic_bytes()
    own = v * h
    # The input of the output projection, or its gradient.
    message = shape.collective_bytes() if shape.tp > 1 else 0.0
    tied_here = shape.model.tie_embeddings and shape.pipeline == 1
    return Cost(
        forward=Work(
            flops=flops,
            matmul_bytes=operands,
            other_bytes=norm + one + cast,
            communication_bytes=message,
            collectives=3 * int(shape.tp > 1),  # two of a number or two a row
            kernels=HEAD_KERNELS * pieces,
        ),
        backward=Work(
            flops=(2 + again) * flops,
            # Every piece is added to the fp32 sum by the product itself.
            matmul_bytes=(2 + again) * operands + 2 * STREAM_BYTES * pieces * own,
            other_bytes=2 * norm + 2 * one + (1 + again) * cast,
            communication_bytes=message,
            collectives=int(shape.tp > 1),
            kernels=2 * HEAD_KERNELS * pieces,
        ),
        parameters=0 if tied_here else own,
        vector_parameters=vectors,
        activation_bytes=kept,
        recompute_bytes=kept,
        working_bytes=_head_working(shape, kernel),
        # Labels; under TP which are here, and this rank's share of a row; one piece's log-softmax.
        logits_bytes=t * (8 + (5 if shape.tp > 1 else 0) + (0 if again else STREAM_BYTES * v)),
    )


def _head_working(shape: _Shape, kernel: Kernel) -> int:
    """Temporary in the head, besides what it keeps: logits beside their softmax, or gradients."""
    t, c, h, v = shape.tokens, shape.c, shape.model.hidden_size, shape.vocabulary
    piece, own, bf16 = shape.rows * v, v * h, shape.c != STREAM_BYTES
    whole = shape.rows == t
    logits = STREAM_BYTES * piece * (1 if whole else 2)  # of one piece the softmax is what is kept
    held = STREAM_BYTES * own if shape.returned and not whole else 0  # the fp32 sum of the pieces
    # The weight's gradient by itself, where the product does not add it.
    by_itself = (shape.returned and (whole or bf16)) or (bf16 and kernel == "torch")
    product = c * own if by_itself else 0
    d_logits = c * piece if bf16 or not whole else 0
    d_input = t * c * h
    backward = d_input + held + max(0 if whole else logits, d_logits + product)
    return max(logits, backward)


@dataclass(frozen=True)
class Times:
    """Seconds of one micro-batch."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class UnitTimes:
    """Seconds that each kind of piece takes one device for one micro-batch.

    Predicted from costs by `predicted_times`, or measured: made of plain numbers.
    """

    embedding: Times
    block: Times
    """Without recomputation: that adds one forward pass to the backward one."""
    head: Times


def predicted_times(costs: Costs, device: Device) -> UnitTimes:
    """A roofline: each product at its slower limit, the rest at the memory's, then messages.

    The sum cannot be shorter than launching the kernels. Tensor groups are within a node.
    """
    return UnitTimes(*(_times(cost, device) for cost in (costs.embedding, costs.block, costs.head)))


def _times(cost: Cost, device: Device) -> Times:
    return Times(_seconds(cost.forward, device), _seconds(cost.backward, device))


def _seconds(work: Work, device: Device) -> float:
    bandwidth = device.memory_bandwidth_gb * 1e9 * device.bandwidth_fraction
    products = max(
        work.flops / (device.tflops * 1e12 * device.matmul_fraction), work.matmul_bytes / bandwidth
    )
    messages = (
        work.communication_bytes / (device.intra_node_gb * 1e9)
        + work.collectives * device.intra_node_latency_us * 1e-6
    )
    launching = work.kernels * device.kernel_launch_us * 1e-6
    return max(products + work.other_bytes / bandwidth + messages, launching)
