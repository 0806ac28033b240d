"""The one model of time: what `keel plan`, its search, the cut and the GPU bench's page expect.

A pass takes as long as its matrix products (at a share of the peak, or at the memory's bandwidth if
that is slower), attention (at its kernel's share of the peak), all other traffic, a gap behind
every kernel, and its messages, one after the other; or, if that is longer, as long as the host
takes to launch its kernels. Costs and kernels are counted from the code (costs.py, launches.py);
the rates are a device's (devices.py).

**How far it is to be trusted.** No GPU has measured it. `spread` gives a range from the model's own
terms: every rate is changed by what is not known of it (`DOUBTS`), one at a time, and the changes
of the slowest stage's time are added as independent errors. To the upper side comes what the model
leaves out: the simulator, fed with measured times of the pieces, lay 1 to 12 % below the trainer in
five layouts on two CPU cores (docs/benchmarks/simulator.md), never above. Measured pieces
(`keel plan --measure`) leave that error alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from keel_megatron.layout.devices import Device
from keel_megatron.layout.work import Cost, Costs, Execution, Work

GRAPH_GAP = 0.5
"""A gap within a CUDA graph, relative to one within a stream: a rule of thumb."""
COMPILED_HOST = 0.63
"""The host's time for a compiled block's kernels, relative to the same number of plain ones: a
whole block at hidden 64 on a CPU, where operators are all it is (docs/performance.md)."""

LEFT_OUT = 0.12
"""Share of a step that the simulator did not see, at most, with measured times of the pieces."""


@dataclass(frozen=True)
class Doubt:
    """What is not known of one figure of a device."""

    figure: str
    better: float
    """Factor of the figure in the favourable case."""
    worse: float
    why: str


DOUBTS = (
    Doubt("matmul_fraction", 1.1, 0.9, "products of hidden 1024 reach 0.58 to 0.72 of the peak"),
    Doubt(
        "attention_fraction", 1.3, 0.7, "FlashAttention-2, cuDNN's and FlashAttention-3 differ so"
    ),
    Doubt("bandwidth_fraction", 1.1, 0.7, "kernels of mixed types are slower"),
    Doubt("strided_fraction", 2.0, 0.8, "never seen in a trace"),
    Doubt("kernel_gap_us", 0.5, 1.7, "between 0.6 and 2 us"),
    Doubt("kernel_launch_us", 0.6, 1.6, "Python and autograd: 12 to 32 us, by the host's clock"),
    Doubt("intra_node_gb", 1.0, 0.7, "links reach less than their data sheet says"),
)


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
    """The pieces' times on a device. Tensor groups are within a node."""
    return UnitTimes(*(_times(cost, device) for cost in (costs.embedding, costs.block, costs.head)))


def _times(cost: Cost, device: Device) -> Times:
    forward, backward = (
        sum(time_parts(work, device, cost.execution).values())
        for work in (cost.forward, cost.backward)
    )
    return Times(forward, backward)


def time_parts(work: Work, device: Device, execution: Execution) -> dict[str, float]:
    """Seconds of a pass by what they go to; together they are its time.

    Args:
        work: one pass over one micro-batch.
        device: what it runs on.
        execution: how its kernels are run.
    """
    peak = device.tflops * 1e12
    memory = device.memory_bandwidth_gb * 1e9
    bandwidth = memory * device.bandwidth_fraction
    product_rate = peak * device.matmul_fraction
    if execution.fp8:
        product_rate = 2 * peak * device.fp8_fraction
    attention = device.cudnn_fraction if execution.cudnn else device.attention_fraction
    gap = device.kernel_gap_us * (GRAPH_GAP if execution.graphed else 1.0)
    launch = device.kernel_launch_us * (COMPILED_HOST if execution.compiled else 1.0)
    parts = {
        "products": max(
            (work.flops - work.attention_flops) / product_rate, work.matmul_bytes / bandwidth
        ),
        "attention": work.attention_flops / (peak * attention),
        "rotary": work.strided_bytes / (memory * device.strided_fraction),
        "other traffic": work.other_bytes / bandwidth,
        "gaps": work.kernels * gap * 1e-6,
        "messages": work.communication_bytes / (device.intra_node_gb * 1e9)
        + work.collectives * device.intra_node_latency_us * 1e-6,
    }
    host = 0.0 if execution.graphed else work.kernels * launch * 1e-6
    parts["waiting for the host"] = max(0.0, host - sum(parts.values()))
    return parts


@dataclass(frozen=True)
class Spread:
    """Between which factors of the expected time the true one is thought to lie."""

    low: float
    high: float


def spread(costs: Costs, device: Device, pieces: tuple[int, int, int]) -> Spread:
    """The range of a stage's predicted time.

    Args:
        costs: of the pieces.
        device: what the stage runs on.
        pieces: its embeddings, blocks and heads.
    """

    def seconds(with_figures: Device) -> float:
        times = predicted_times(costs, with_figures)
        each = (times.embedding, times.block, times.head)
        return sum(count * one.total for count, one in zip(pieces, each, strict=True))

    expected = seconds(device)
    faster, slower = 0.0, LEFT_OUT**2
    for doubt in DOUBTS:
        for factor in (doubt.better, doubt.worse):
            value = getattr(device, doubt.figure) * factor
            change = seconds(replace(device, **{doubt.figure: value})) / expected - 1.0
            faster += min(change, 0.0) ** 2
            slower += max(change, 0.0) ** 2
    return Spread(1.0 - faster**0.5, 1.0 + slower**0.5)


def measured_spread() -> Spread:
    """The range of a step whose pieces' times were measured."""
    return Spread(1.0, 1.0 + LEFT_OUT / (1.0 - LEFT_OUT))
