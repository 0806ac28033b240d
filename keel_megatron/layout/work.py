"""What costs are made of: one pass's work, a piece's cost, and one device's share of the shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel_megatron.config.model import ModelConfig
from keel_megatron.config.run import RunConfig

Kernel = Literal["triton", "torch"]
"""How the fused scaled add + RMSNorm is done: one kernel (CUDA), or torch's operators (CPU)."""

STREAM_BYTES = 4
"""The residual stream is fp32."""


@dataclass(frozen=True)
class Work:
    """One pass over one micro-batch."""

    flops: float = 0.0
    """Of matrix products, as the hardware does them."""
    attention_flops: float = 0.0
    """Of these, attention's own, which its kernel does at another rate."""
    matmul_bytes: float = 0.0
    """Operands and results of matrix products; attention's are in its kernel's rate."""
    other_bytes: float = 0.0
    """Moved by everything else: norms, SwiGLU, softmax, gradient sums."""
    strided_bytes: float = 0.0
    """Of the rotary embedding: moved by strided kernels, at another rate."""
    communication_bytes: float = 0.0
    """Sent by this device to its tensor-parallel group."""
    collectives: int = 0
    """Messages of the tensor-parallel group."""
    kernels: int = 0
    """Kernels launched."""


@dataclass(frozen=True)
class Execution:
    """How a block's kernels are run, by `kernels.*`."""

    compiled: bool = False
    graphed: bool = False
    cudnn: bool = False
    """cuDNN's attention, by Transformer Engine, in place of flash attention."""
    fp8: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> Execution:
        """What a run's settings ask for."""
        kernels = config.kernels
        return cls(
            compiled=kernels.compile,
            graphed=kernels.cuda_graphs,
            cudnn=kernels.backend == "transformer_engine",
            fp8=kernels.fp8 != "none",
        )


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
    execution: Execution = Execution()
    """How its kernels are run."""


@dataclass(frozen=True)
class Costs:
    """The three kinds of pieces that a stage is made of."""

    embedding: Cost
    block: Cost
    """A typical block: Keel's first, which has a norm less, is counted as one."""
    head: Cost
    """Final norm, output projection and loss."""


@dataclass(frozen=True)
class Shape:
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
    def of(cls, config: RunConfig) -> Shape:
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
