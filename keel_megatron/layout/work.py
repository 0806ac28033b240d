"""Building blocks of costs: work of a pass, cost of a piece, shapes on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel_megatron.config.model import ModelConfig
from keel_megatron.config.run import RunConfig

Kernel = Literal["triton", "torch"]
"""Whether operations may be Triton kernels (CUDA), or are torch's operators (CPU)."""

Attention = Literal["auto", "cudnn", "flash"]

STREAM_BYTES = 4
"""The residual stream is fp32."""


@dataclass(frozen=True)
class Work:
    """Work of one pass over one micro-batch."""

    flops: float = 0.0
    """FLOPs of matrix products, as executed."""
    attention_flops: float = 0.0
    """FLOPs of attention among them, which its kernel executes at another rate."""
    products: int = 0
    """Number of matrix products."""
    results: float = 0.0
    """Elements of the matrix products' results."""
    matmul_bytes: float = 0.0
    """Bytes of operands and results of matrix products, without attention's."""
    other_bytes: float = 0.0
    """Bytes moved by everything else: norms, SwiGLU, softmax, gradient sums."""
    strided_bytes: float = 0.0
    """Bytes moved by the rotary embedding's strided kernels, at another rate."""
    communication_bytes: float = 0.0
    """Bytes sent by this device to its tensor-parallel group."""
    collectives: int = 0
    """Number of messages of the tensor-parallel group."""
    kernels: int = 0
    """Number of kernels."""


@dataclass(frozen=True)
class Execution:
    """How a block's kernels are executed, from the settings `kernels.*`."""

    compiled: bool = False
    graphed: bool = False
    attention: Attention = "flash"
    """Attention's kernel; auto: the device's first choice."""
    fp8: bool = False
    rule: str = "keel"
    """The residual rule, on which the host's time depends."""
    qk_norm: bool = False
    """Whether it has QK-norm besides, as the host's time does."""
    triton: tuple[str, ...] = ()
    """Operations that are Triton kernels."""

    @classmethod
    def of(cls, config: RunConfig, kernel: Kernel = "triton") -> Execution:
        """The execution that a run's settings choose; kernel: what its device permits."""
        kernels = config.kernels
        return cls(
            triton=kernels.triton if kernel == "triton" else (),
            compiled=kernels.compile,
            graphed=kernels.cuda_graphs,
            attention=_attention(config),
            fp8=kernels.fp8 != "none",
            rule=config.model.residual,
            qk_norm=config.model.qk_norm,
        )


def _attention(config: RunConfig) -> Attention:
    """The kernel that `kernels.attention` chooses (model/attention_kernel.py)."""
    if config.kernels.backend == "transformer_engine":
        return "auto"
    if config.kernels.attention == "auto" and config.data.seq_length % 128:
        return "flash"
    return config.kernels.attention


@dataclass(frozen=True)
class Cost:
    """Cost of one embedding, block or head on one device."""

    forward: Work
    backward: Work
    parameters: int
    """Number of weights on this device, in the compute type."""
    vector_parameters: int
    """Number of norm weights and learned vectors on this device, always fp32."""
    activation_bytes: int
    """Bytes of activations kept for the backward pass of a micro-batch (head: without logits)."""
    recompute_bytes: int
    """The same with recomputation."""
    working_bytes: int
    """Temporary bytes besides that, in the larger of both passes."""
    logits_bytes: int = 0
    """Bytes of logits that the loss keeps for the backward pass."""
    light_bytes: int = 0
    """`activation_bytes` under light recomputation (model/recompute.py)."""
    light: Work = Work()
    """What light recomputation adds to the backward pass."""
    boundary_bytes: int = 0
    """What the first light block of a chunk keeps besides: an input that it cannot recompute."""
    shared_bytes: int = 0
    """Bytes that all blocks of a chunk share for a micro-batch: the mask of its documents."""
    execution: Execution = Execution()
    """How its kernels are executed."""

    def kept_bytes(self, blocks: int, full: int, light: int) -> int:
        """Bytes of activations of a chunk's blocks, some of them recomputed fully or lightly."""
        return (
            (blocks - full - light) * self.activation_bytes
            + full * self.recompute_bytes
            + light * self.light_bytes
            + (self.boundary_bytes if light else 0)
        )


@dataclass(frozen=True)
class Costs:
    """Costs of the three kinds of pieces of a stage."""

    embedding: Cost
    block: Cost
    """A typical block; Keel's first block, with one norm fewer, counts as one."""
    head: Cost
    """Final norm, output layer and loss."""
    muon_bytes: int = 2
    """Bytes of an element in Muon's products: bf16 on CUDA, fp32 on a CPU."""


@dataclass(frozen=True)
class Shape:
    """Shapes of a micro-batch on one device."""

    model: ModelConfig
    seq_length: int
    tokens: int
    c: int
    tp: int
    h: int
    """Hidden size h; h/TP under SP, the average number of elements per token on a device."""
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
    """Tokens whose logits are in memory at once."""
    returned: bool
    """Whether weight gradients are returned by the backward pass, as in the DeepSpeed engine."""
    zero_3: bool
    """Whether DeepSpeed shards the weights."""
    z_loss: bool
    """Whether there is a z-loss."""

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        """The shapes of a run."""
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
            zero_3=config.training.engine == "deepspeed" and config.deepspeed.zero_stage == 3,
            z_loss=config.training.z_loss > 0.0,
        )

    @property
    def pieces(self) -> int:
        """Number of pieces in which the tokens go through the head."""
        return -(-self.tokens // self.rows)

    def collective_bytes(self) -> float:
        """Bytes that a device sends for one all-gather or reduce-scatter of activations."""
        return self.tokens * self.model.hidden_size * self.c * (self.tp - 1) / self.tp

    def statistic_bytes(self) -> int:
        """Bytes of one norm's 1 / rms per token."""
        return 4 * self.tokens * self.h // self.model.hidden_size

    def adds_gradients(self, kernel: Kernel, execution: Execution) -> bool:
        """Whether a block's products add the weights' gradients to DDP's sums (model/linear.py)."""
        captured = execution.compiled or execution.graphed or execution.fp8
        on_device = kernel == "triton" or self.c == STREAM_BYTES
        return self.tp == 1 and not self.returned and not captured and on_device

    def gradient_bytes(self, parameters: int) -> int:
        """Bytes to write a gradient in the compute type and add it to the fp32 gradient."""
        return parameters * (2 * self.c + 8)
