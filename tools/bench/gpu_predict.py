"""What each speed lever should bring on one GPU, computed before anything was measured.

A block's time is that of its products, its attention and its other traffic at the device's rates
(partition/costs.py, devices.py), and a gap behind every kernel (partition/launches.py); or, if that
is more, the time for which the host launches. A lever changes one of these figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from keel_megatron.config.run import RunConfig
from keel_megatron.partition import launches
from keel_megatron.partition.costs import Work, join_bytes, model_costs
from keel_megatron.partition.devices import Device
from keel_megatron.partition.flops import attention_score_flops, training_flops_per_token
from keel_megatron.partition.plan import make_plan

GAP_US, GRAPH_GAP_US = 1.2, 0.6
"""Idle time between two kernels of a stream and of a graph: rules of thumb."""
FLASH_FRACTION, CUDNN_FRACTION = 0.35, 0.5
"""Share of the peak of causal attention at head size 64: torch's, Transformer Engine's."""
FP8_FRACTION = 0.5
"""Share of fp8's peak, twice bf16's, that its products reach at hidden 1024."""

ASSUMPTIONS = (
    f"a gap of {GAP_US} us behind every kernel of a stream and {GRAPH_GAP_US} us within a graph; "
    f"attention at {FLASH_FRACTION:.0%} of the peak ({CUDNN_FRACTION:.0%} in Transformer Engine); "
    f"fp8 products at {FP8_FRACTION:.0%} of twice the peak"
)

OPERATORS_BYTES = (72, 144)
"""Bytes that an element of a join moves in torch's operators (kernels/fused.py), forward: the sum
10, two norms of 28 (squares 8, their sum 4, two products of 8), the cast 6; backward: two norms of
56, the sum 12, three casts and products of 20."""
OPERATORS_KERNELS = (16, 20)


@dataclass(frozen=True)
class Block:
    """What decides a block's time, for one micro-batch."""

    product_flops: tuple[float, float]
    attention_flops: tuple[float, float]
    other_bytes: tuple[float, float]
    kernels: tuple[int, int]
    product_rate: float
    attention_rate: float
    bandwidth: float
    gap_us: float
    launch_us: float
    again: bool = False
    """Whether the forward pass is computed again going back."""

    def parts(self, way: int) -> dict[str, float]:
        """Seconds of a pass by what bounds them; way 0 = forward, 1 = backward."""
        return {
            "products": self.product_flops[way] / self.product_rate,
            "attention": self.attention_flops[way] / self.attention_rate,
            "other traffic": self.other_bytes[way] / self.bandwidth,
            "gaps": self.kernels[way] * self.gap_us * 1e-6,
        }

    def seconds(self) -> float:
        """Of both passes: the device's work, or the host's launching if that takes longer."""
        ways = (0, 1, 0) if self.again else (0, 1)
        return sum(
            max(sum(self.parts(way).values()), self.kernels[way] * self.launch_us * 1e-6)
            for way in ways
        )


def block_of(config: RunConfig, device: Device) -> Block:
    """A block in the plain way."""
    cost = model_costs(config).block
    tokens = config.data.seq_length * config.training.micro_batch_size
    scores = attention_score_flops(config.model, config.data.seq_length) * tokens
    peak = device.tflops * 1e12
    return Block(
        product_flops=(cost.forward.flops - scores, cost.backward.flops - 2.5 * scores),
        attention_flops=(scores, 2.5 * scores),
        other_bytes=(cost.forward.other_bytes, cost.backward.other_bytes),
        kernels=launches.total(launches.BLOCK),
        product_rate=peak * device.matmul_fraction,
        attention_rate=peak * FLASH_FRACTION,
        bandwidth=device.memory_bandwidth_gb * 1e9 * device.bandwidth_fraction,
        gap_us=GAP_US,
        launch_us=device.kernel_launch_us,
    )


@dataclass(frozen=True)
class Step:
    """A step's seconds by part."""

    blocks: float
    head: float
    embedding: float
    update: float
    parts: dict[str, float]
    """Of the blocks: by what bounds them."""
    mfu: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.blocks + self.head + self.embedding + self.update


Change = Callable[[Block, RunConfig, Device], Block]


def step_of(config: RunConfig, device: Device, change: Change | None = None) -> Step:
    """A step of a run on one device."""
    block = block_of(config, device)
    block = block if change is None else change(block, config, device)
    training, model = config.training, config.model
    count = training.global_batch_size // training.micro_batch_size
    costs = model_costs(config)
    head, embedding = (
        count * sum(_seconds(work, device) for work in (cost.forward, cost.backward))
        for cost in (costs.head, costs.embedding)
    )
    update = make_plan(config, 1, device).closing_seconds
    times = count * model.blocks
    ways = (0, 1, 0) if block.again else (0, 1)
    parts = {name: times * sum(block.parts(way)[name] for way in ways) for name in block.parts(0)}
    blocks = times * block.seconds()
    tokens = training.global_batch_size * config.data.seq_length
    flops = tokens * training_flops_per_token(model, config.data.seq_length, config.data.vocab_size)
    mfu = flops / (blocks + head + embedding + update) / (device.tflops * 1e12)
    return Step(blocks, head, embedding, update, parts, mfu)


def _seconds(work: Work, device: Device) -> float:
    """Of the head's or the embedding's pass, with a gap behind every kernel."""
    bandwidth = device.memory_bandwidth_gb * 1e9 * device.bandwidth_fraction
    products = work.flops / (device.tflops * 1e12 * device.matmul_fraction)
    return products + work.other_bytes / bandwidth + work.kernels * GAP_US * 1e-6


def pre_ln(block: Block, _config: RunConfig, _device: Device) -> Block:
    """Two gains fewer whose gradients are added; the fused kernel moves the same."""
    forward, backward = block.kernels
    return replace(block, kernels=(forward, backward - 2))


def operators(block: Block, config: RunConfig, _device: Device) -> Block:
    """Joins in torch's operators."""
    elements = 2 * config.data.seq_length * config.training.micro_batch_size
    elements *= config.model.hidden_size
    fused = join_bytes(1, 2)
    joins = (2, 4)
    return replace(
        block,
        other_bytes=tuple(
            moved + elements * (OPERATORS_BYTES[way] - fused[way])
            for way, moved in enumerate(block.other_bytes)
        ),
        kernels=tuple(
            count - joins[way] + 2 * OPERATORS_KERNELS[way]
            for way, count in enumerate(block.kernels)
        ),
    )


def compiled(block: Block, config: RunConfig, _device: Device) -> Block:
    """Rotary reads and writes once; the gains' sums read their operands once more."""
    tokens, model = config.data.seq_length * config.training.micro_batch_size, config.model
    a, g = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    eager = 2 * (5 * (a + g) + 2 * g)
    saved = (eager - 2 * 2 * (a + g), eager - 2 * 2 * (a + 2 * g))
    again = 2 * 12 * model.hidden_size  # u and the gradients of x' and z, of both joins
    return replace(
        block,
        other_bytes=(
            block.other_bytes[0] - tokens * saved[0],
            block.other_bytes[1] - tokens * (saved[1] - again),
        ),
        kernels=launches.total(launches.COMPILED),
    )


def graphed(block: Block, _config: RunConfig, _device: Device) -> Block:
    """The host launches once a pass; gaps within a graph are shorter."""
    return replace(block, gap_us=GRAPH_GAP_US, launch_us=0.0)


def both(block: Block, config: RunConfig, device: Device) -> Block:
    """Compiled blocks, recorded."""
    return graphed(compiled(block, config, device), config, device)


def recomputed(block: Block, _config: RunConfig, _device: Device) -> Block:
    """The forward pass again."""
    return replace(block, again=True)


def transformer_engine(block: Block, _config: RunConfig, device: Device) -> Block:
    """CuDNN's attention."""
    return replace(block, attention_rate=device.tflops * 1e12 * CUDNN_FRACTION)


def fp8(block: Block, config: RunConfig, device: Device) -> Block:
    """Products at twice the peak; every operand is read for its scale, then cast and transposed."""
    tokens, model = config.data.seq_length * config.training.micro_batch_size, config.model
    h, f = model.hidden_size, model.ffn_hidden_size
    a, g = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    inputs, gradients = h + a + h + f, (a + 2 * g) + h + 2 * f + h
    weights = h * (2 * a + 2 * g) + 3 * h * f
    cast = 2 + 2 + 2  # read for the largest value; read, and written twice
    block = transformer_engine(block, config, device)
    return replace(
        block,
        product_rate=2 * device.tflops * 1e12 * FP8_FRACTION,
        other_bytes=(
            block.other_bytes[0] + cast * (tokens * inputs + weights),
            block.other_bytes[1] + cast * tokens * gradients,
        ),
        # Of each operand of the four products a largest value and a cast.
        kernels=(block.kernels[0] + 16, block.kernels[1] + 8),
    )


@dataclass(frozen=True)
class Lever:
    """A variant beside the base, and what should come of it."""

    name: str
    settings: tuple[str, ...]
    change: Change | None
    why: str
    operators: bool = False
    """Whether joins are done in torch's operators, for which there is no setting."""
    needs: str = ""
    """A package without which it is left out."""
    seconds: int = 110
    """After which it is given up."""


MICRO = "training.micro_batch_size={}"
TE = "kernels.backend=transformer_engine"
LEVERS: tuple[Lever, ...] = (
    Lever("base: Keel", (), None, "local modules, the fused kernel, micro-batch 1"),
    Lever(
        "Pre-LN",
        ("model.residual=pre_ln",),
        pre_ln,
        "the fused kernel moves the same; two gains' sums less (aim: Keel at most 1.02 of it)",
    ),
    Lever(
        "joins in torch's operators",
        (),
        operators,
        "every operator reads and writes the stream again",
        operators=True,
    ),
    Lever(
        "compile",
        ("kernels.compile=true",),
        compiled,
        "rotary fused; but the gains' sums are a pass of their own",
        seconds=240,
    ),
    Lever(
        "CUDA graphs",
        ("kernels.cuda_graphs=true",),
        graphed,
        "at 4,096 tokens the host is not the limit; shorter gaps remain",
        seconds=180,
    ),
    Lever(
        "compile and CUDA graphs",
        ("kernels.compile=true", "kernels.cuda_graphs=true"),
        both,
        "fewer kernels with shorter gaps",
        seconds=240,
    ),
    Lever("micro-batch 2", (MICRO.format(2),), None, "half the gaps and weights' sums a token"),
    Lever("micro-batch 4", (MICRO.format(4),), None, "a quarter of them"),
    Lever(
        "loss in pieces",
        ("kernels.logits_mib=512",),
        None,
        "the head's product made again; a quarter of the logits in memory",
    ),
    Lever("recompute", ("parallel.recompute=full",), recomputed, "one forward pass more"),
    Lever(
        "Transformer Engine",
        (TE,),
        transformer_engine,
        "cuDNN's attention",
        needs="transformer_engine.pytorch",
    ),
    Lever(
        "Transformer Engine, fp8",
        (TE, "kernels.fp8=hybrid"),
        fp8,
        "products twice as fast; operands of hidden 1024 are read twice more to be cast",
        needs="transformer_engine.pytorch",
        seconds=180,
    ),
)
