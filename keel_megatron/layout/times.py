"""Time model of `keel plan`, its search, the block assignment and the GPU benchmark's page.

The device's time of a pass is the sum of its matrix products, attention (at its kernel's fraction
of the peak), other memory access, a gap after each kernel, and communication. A product takes the
time of its multiplications at a fraction of the peak, a constant, and a part per result; or that of
its memory access, if that is longer. Costs and kernels are counted from the code (costs.py,
kernel_counts.py); the rates are those of a device (devices.py).

The host's time of a pass is that of Python and autograd (host_times.py), and of launching the
kernels. The device runs kernels while the host launches later ones, and the host waits for it once
a step. So a stage's micro-batch takes the longer of both sums, forward and backward together: where
the host's is longer, the device waits for launches.

**Accuracy.** Compared with one H200 and one H100 (docs/benchmarks/gpu.md; steps of 64 and 512
blocks, one GPU). Where the device is the limit, a step took 1.07 to 1.19 times the expected time,
1.12 in the median, and ratios between options agree within 0.07. The expected host is a fast one:
beside those two GPUs, on 16 cores of an Intel Xeon in a virtual machine, a block took it 1.9 to 3.5
times as long, so at micro-batch 1 a step took 2.1 to 2.9 times the expected time. `--figure
kernel_launch_us=20 --figure python_scale=2` expects such a host. Messages between GPUs were not
compared.

`spread` gives a range: each rate varies within its uncertainty (`DOUBTS`), one at a time, and the
changes of the slowest stage's time are added as independent errors. All measured steps but one are
within it (PyTorch's SwiGLU, 1 % above). The upper end also includes what the model leaves out: with
measured times of the pieces, the simulator was 1 to 12 % below the trainer in five layouts on two
CPU cores (docs/benchmarks/simulator.md), never above. With `keel plan --measure` only this error
remains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from keel_megatron.layout.devices import Device
from keel_megatron.layout.host_times import calibration
from keel_megatron.layout.work import Cost, Costs, Execution, Work

GRAPH_GAP = 0.5
"""Gap between kernels in a CUDA graph, relative to a stream: a rule of thumb."""

LEFT_OUT = 0.12
"""Largest fraction of a step that the simulator missed, with measured times of the pieces."""


SLOW_HOST = 3.5
"""Time of a block on the slowest host measured beside a GPU, relative to the expected time."""


@dataclass(frozen=True)
class Doubt:
    """Uncertainty of a property of a device, or of several that vary together."""

    figures: tuple[str, ...]
    better: float
    """Factor of the properties in the favourable case."""
    worse: float
    why: str


DOUBTS = (
    Doubt(("matmul_fraction",), 1.03, 0.9, "from the published products; a GPU's clock varies"),
    Doubt(("cudnn_fraction",), 1.2, 0.85, "a part is estimated; later versions are faster"),
    Doubt(("flash_fraction",), 1.1, 0.85, "a part is estimated"),
    Doubt(("bandwidth_fraction",), 1.1, 0.65, "kernels of mixed types are slower"),
    Doubt(("strided_fraction",), 2.0, 0.8, "never seen in a trace"),
    Doubt(("kernel_gap_us",), 0.5, 1.7, "between 0.6 and 2 us"),
    Doubt(
        ("kernel_launch_us", "python_scale"),
        0.6,
        SLOW_HOST,
        "by the host's clock, and whether it is shared; on two measured machines 1.9 to 3.5",
    ),
    Doubt(("intra_node_gb",), 1.0, 0.7, "measured bandwidth is below the data sheet"),
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
class HostTimes:
    """Times of the host for one micro-batch, seconds."""

    block: Times
    """Per block, without recomputation."""
    chunk: Times
    """Per chunk, besides its blocks."""
    end: Times
    """Of the embedding, or of the head: half of both."""
    light: float
    """What light recomputation adds to a block's backward pass."""


@dataclass(frozen=True)
class Load:
    """What a stage or a chunk computes for a micro-batch."""

    blocks: int
    embedding: bool = False
    head: bool = False
    full: int = 0
    """Fully recomputed blocks."""
    light: int = 0
    """Lightly recomputed blocks."""
    chunks: int = 1


@dataclass(frozen=True)
class StageTimes:
    """Times of a load, on the device and on the host."""

    device: Times
    host: Times
    """Zero where the host's time is part of the device's."""

    @property
    def bound(self) -> Literal["device", "host"]:
        """Which of both takes longer."""
        return "host" if self.host.total > self.device.total else "device"

    @property
    def longer(self) -> Times:
        """The times of the longer one."""
        return self.of(self.bound)

    def of(self, bound: str) -> Times:
        """The times of `device` or `host`."""
        return self.host if bound == "host" else self.device


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
    host: HostTimes | None = None
    """The host's; None: part of the others, as on a CPU and in measured times."""

    def recomputing(self, full: int, light: int) -> float:
        """What so many recomputed blocks add to a backward pass on the device."""
        return full * self.block.forward + light * self.light

    def of(self, load: Load) -> StageTimes:
        """Times of a stage or a chunk."""
        n, first, last = load.blocks, int(load.embedding), int(load.head)
        emb, block, head = self.embedding, self.block, self.head
        device = Times(
            n * block.forward + first * emb.forward + last * head.forward,
            n * block.backward
            + first * emb.backward
            + last * head.backward
            + self.recomputing(load.full, load.light),
        )
        if self.host is None:
            return StageTimes(device, Times(0.0, 0.0))
        own, chunk, end = self.host.block, self.host.chunk, self.host.end
        again = load.full * own.forward + load.light * self.host.light
        host = Times(
            n * own.forward + load.chunks * chunk.forward + (first + last) * end.forward,
            n * own.backward + load.chunks * chunk.backward + (first + last) * end.backward + again,
        )
        return StageTimes(device, host)


def predicted_times(costs: Costs, device: Device) -> UnitTimes:
    """Predicted times on a device. Tensor-parallel groups are assumed to be within a node."""
    light = sum(time_parts(costs.block.light, device, costs.block.execution).values())
    pieces = (costs.embedding, costs.block, costs.head)
    embedding, block, head = (_times(cost, device) for cost in pieces)
    host = host_times(costs, device) if device.asynchronous else None
    return UnitTimes(embedding, block, head, light, host)


def _times(cost: Cost, device: Device) -> Times:
    forward, backward = (
        sum(time_parts(work, device, cost.execution).values())
        for work in (cost.forward, cost.backward)
    )
    return Times(forward, backward)


def host_times(costs: Costs, device: Device) -> HostTimes:
    """Predicted times of the host: Python and autograd, and launching kernels.

    A CUDA graph is launched once for all blocks, in a time that is left out.
    """
    block, execution, found = costs.block, costs.block.execution, calibration()
    launch, scale = device.kernel_launch_us * 1e-6, device.python_scale
    python = found.block(execution.rule, compiled=execution.compiled, qk_norm=execution.qk_norm)
    if execution.graphed:
        own, light = Times(0.0, 0.0), 0.0
    else:
        own = Times(
            scale * python.forward + launch * block.forward.kernels,
            scale * python.backward + launch * block.backward.kernels,
        )
        light = launch * block.light.kernels
    pieces = (costs.embedding, costs.head)
    end = Times(
        0.5 * scale * found.ends.forward + 0.5 * launch * sum(p.forward.kernels for p in pieces),
        0.5 * scale * found.ends.backward + 0.5 * launch * sum(p.backward.kernels for p in pieces),
    )
    chunk = Times(scale * found.chunk.forward, scale * found.chunk.backward)
    return HostTimes(own, chunk, end, light)


def time_parts(work: Work, device: Device, execution: Execution) -> dict[str, float]:
    """Device time of a pass by part, seconds; the sum is its total time.

    Args:
        work: one pass over one micro-batch.
        device: the device.
        execution: how the kernels are executed.
    """
    peak = device.tflops * 1e12
    memory = device.memory_bandwidth_gb * 1e9
    bandwidth = memory * device.bandwidth_fraction
    gap = device.kernel_gap_us * (GRAPH_GAP if execution.graphed else 1.0)
    parts = {
        "products": max(_product_seconds(work, device, execution), work.matmul_bytes / bandwidth),
        "attention": work.attention_flops / (peak * attention_fraction(device, execution)),
        "rotary": work.strided_bytes / (memory * device.strided_fraction),
        "other memory access": work.other_bytes / bandwidth,
        "gaps": work.kernels * gap * 1e-6,
        "messages": work.communication_bytes / (device.intra_node_gb * 1e9)
        + work.collectives * device.intra_node_latency_us * 1e-6,
    }
    if not device.asynchronous:
        least = 0.0 if execution.graphed else work.kernels * device.kernel_launch_us * 1e-6
        least *= calibration().compiled_ratio if execution.compiled else 1.0
        parts["operators' overhead"] = max(0.0, least - sum(parts.values()))
    return parts


def _product_seconds(work: Work, device: Device, execution: Execution) -> float:
    """Time of a pass's matrix products, without attention's."""
    rate = device.tflops * 1e12 * device.matmul_fraction
    if execution.fp8:
        rate = 2 * device.tflops * 1e12 * device.fp8_fraction
    setup = 2 * device.matmul_setup_k * work.results / rate
    setup += work.products * device.matmul_setup_us * 1e-6
    return (work.flops - work.attention_flops) / rate + setup


def attention_fraction(device: Device, execution: Execution) -> float:
    """The fraction of the peak that the run's attention kernel reaches on a device."""
    first = "cudnn" if device.cudnn_first else "flash"
    chosen = first if execution.attention == "auto" else execution.attention
    return device.cudnn_fraction if chosen == "cudnn" else device.flash_fraction


@dataclass(frozen=True)
class Spread:
    """Range of the actual time, as factors of the expected time."""

    low: float
    high: float


def spread(costs: Costs, device: Device, load: Load) -> Spread:
    """Range of a stage's predicted time.

    Args:
        costs: costs of embedding, block and head.
        device: the device of the stage.
        load: what the stage computes.
    """

    def seconds(with_figures: Device) -> float:
        """The stage's time on such a device."""
        return predicted_times(costs, with_figures).of(load).longer.total

    expected = seconds(device)
    faster, slower = 0.0, LEFT_OUT**2
    for doubt in DOUBTS:
        for factor in (doubt.better, doubt.worse):
            values = {name: getattr(device, name) * factor for name in doubt.figures}
            change = seconds(replace(device, **values)) / expected - 1.0
            faster += min(change, 0.0) ** 2
            slower += max(change, 0.0) ** 2
    return Spread(1.0 - faster**0.5, 1.0 + slower**0.5)


def measured_spread() -> Spread:
    """Range of a step's time predicted from measured times of the pieces."""
    return Spread(1.0, 1.0 + LEFT_OUT / (1.0 - LEFT_OUT))
