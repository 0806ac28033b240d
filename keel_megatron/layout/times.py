"""Time model of `keel plan`, its search, the block assignment and the GPU benchmark's page.

The time of a pass is the sum of its matrix products (at a fraction of the peak, or at the memory
bandwidth if that is slower), attention (at its kernel's fraction of the peak), other memory access,
a gap after each kernel, and communication. If the host takes longer to launch the kernels, the time
is the host's. Costs and kernels are counted from the code (costs.py, kernel_counts.py); the rates
are those of a device (devices.py).

**Accuracy.** The model has not been compared with a GPU. `spread` gives a range: each rate varies
within its uncertainty (`DOUBTS`), one at a time, and the changes of the slowest stage's time are
added as independent errors. The upper end also includes what the model leaves out: with measured
times of the pieces, the simulator was 1 to 12 % below the trainer in five layouts on two CPU cores
(docs/benchmarks/simulator.md), never above. With `keel plan --measure` only this error remains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from keel_megatron.layout.devices import Device
from keel_megatron.layout.work import Cost, Costs, Execution, Work

GRAPH_GAP = 0.5
"""Gap between kernels in a CUDA graph, relative to a stream: a rule of thumb."""
COMPILED_HOST = 0.63
"""Host time per kernel of a compiled block, relative to an eager one: measured for a block of
hidden size 64 on a CPU, which is bound by operator overhead (docs/performance.md)."""

LEFT_OUT = 0.12
"""Largest fraction of a step that the simulator missed, with measured times of the pieces."""


@dataclass(frozen=True)
class Doubt:
    """Uncertainty of one property of a device."""

    figure: str
    better: float
    """Factor of the property in the favourable case."""
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
    Doubt("intra_node_gb", 1.0, 0.7, "measured bandwidth is below the data sheet"),
)


@dataclass(frozen=True)
class Times:
    """Forward and backward time of one micro-batch, seconds."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class UnitTimes:
    """Times of embedding, block and head on one device for one micro-batch, seconds.

    Predicted from costs by `predicted_times`, or measured.
    """

    embedding: Times
    block: Times
    """Without recomputation, which adds a forward pass to the backward pass."""
    head: Times
    light: float = 0.0
    """What light recomputation adds to a block's backward pass."""

    def recomputing(self, full: int, light: int) -> float:
        """What so many recomputed blocks add to a backward pass."""
        return full * self.block.forward + light * self.light


def predicted_times(costs: Costs, device: Device) -> UnitTimes:
    """Predicted times on a device. Tensor-parallel groups are assumed to be within a node."""
    light = sum(time_parts(costs.block.light, device, costs.block.execution).values())
    pieces = (costs.embedding, costs.block, costs.head)
    embedding, block, head = (_times(cost, device) for cost in pieces)
    return UnitTimes(embedding, block, head, light)


def _times(cost: Cost, device: Device) -> Times:
    forward, backward = (
        sum(time_parts(work, device, cost.execution).values())
        for work in (cost.forward, cost.backward)
    )
    return Times(forward, backward)


def time_parts(work: Work, device: Device, execution: Execution) -> dict[str, float]:
    """Time of a pass by part, seconds; the sum is its total time.

    Args:
        work: one pass over one micro-batch.
        device: the device.
        execution: how the kernels are executed.
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
        "other memory access": work.other_bytes / bandwidth,
        "gaps": work.kernels * gap * 1e-6,
        "messages": work.communication_bytes / (device.intra_node_gb * 1e9)
        + work.collectives * device.intra_node_latency_us * 1e-6,
    }
    host = 0.0 if execution.graphed else work.kernels * launch * 1e-6
    parts["waiting for the host"] = max(0.0, host - sum(parts.values()))
    return parts


@dataclass(frozen=True)
class Spread:
    """Range of the actual time, as factors of the expected time."""

    low: float
    high: float


def spread(costs: Costs, device: Device, pieces: tuple[int, int, int]) -> Spread:
    """Range of a stage's predicted time.

    Args:
        costs: costs of embedding, block and head.
        device: the device of the stage.
        pieces: number of embeddings, blocks and heads.
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
    """Range of a step's time predicted from measured times of the pieces."""
    return Spread(1.0, 1.0 + LEFT_OUT / (1.0 - LEFT_OUT))
