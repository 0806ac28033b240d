"""What devices can do: the few figures that a prediction of time and memory needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keel_megatron.config.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A device and its links; every figure can be overridden (`device_named`)."""

    name: str
    tflops: float
    """Peak of dense bf16 matrix products, 1e12 FLOP/s."""
    memory_gb: float | None
    """Memory, 1e9 bytes; None = no limit is known."""
    reserved_gb: float
    """Of it, what the model never gets: driver context, NCCL and cuBLAS buffers, fragments."""
    memory_bandwidth_gb: float
    """Memory bandwidth, 1e9 bytes/s."""
    intra_node_gb: float
    """Bandwidth to a device of the same node, one direction, 1e9 bytes/s."""
    intra_node_latency_us: float
    """Time of an empty message within a node."""
    inter_node_gb: float
    """Bandwidth to a device of another node, one direction, 1e9 bytes/s."""
    inter_node_latency_us: float
    """Time of an empty message between nodes."""
    devices_per_node: int
    matmul_fraction: float
    """Share of the peak that large matrix products reach."""
    attention_fraction: float
    """Share of the peak that causal attention reaches at head size 64: torch's."""
    cudnn_fraction: float
    """The same of Transformer Engine's."""
    fp8_fraction: float
    """Share of fp8's peak, twice bf16's, that its products reach."""
    bandwidth_fraction: float
    """Share of the memory bandwidth that element-wise kernels reach."""
    strided_fraction: float
    """The same of the rotary embedding's, whose accesses are strided and not vectorised."""
    kernel_gap_us: float
    """Idle time behind every kernel."""
    kernel_launch_us: float
    """Time for which the host is busy with one kernel, Python and autograd included: work cannot be
    shorter than that."""


_GPU_HOPPER = (0.65, 0.35, 0.5, 0.5, 0.85, 0.31, 1.2, 20.0)
_GPU_AMPERE = (0.75, 0.5, 0.5, 0.5, 0.85, 0.31, 1.2, 20.0)
_CPU = (0.8, 0.8, 0.8, 0.8, 0.5, 0.5, 0.0, 25.0)
"""Fractions (products, attention, cuDNN's, fp8's, bandwidth, strided), a kernel's gap and
its launch."""

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h200", 989.0, 141.0, 4.0, 4800.0, 450.0, 8.0, 50.0, 20.0, 8, *_GPU_HOPPER),
        Device("h100", 989.0, 80.0, 4.0, 3350.0, 450.0, 8.0, 50.0, 20.0, 8, *_GPU_HOPPER),
        Device("a100", 312.0, 80.0, 4.0, 2039.0, 300.0, 8.0, 25.0, 20.0, 8, *_GPU_AMPERE),
        Device("b200", 2250.0, 180.0, 4.0, 8000.0, 900.0, 8.0, 50.0, 20.0, 8, *_GPU_HOPPER),
        Device("cpu", 0.12, None, 0.0, 40.0, 1.0, 100.0, 1.0, 200.0, 64, *_CPU),
    )
}
"""By name.

Peaks, memory, memory bandwidth and NVLink (half of the two-way figure) are from NVIDIA's data
sheets of the H200 SXM, H100 SXM, A100 80GB SXM and B200 (HGX), the dense figures without sparsity;
inter-node links are one 400 Gb/s port a GPU (200 Gb/s beside an A100). The fractions, latencies,
reserved memory, gaps and launch times are rules of thumb for eager PyTorch, not measurements: none
was measured on a GPU. `cpu` is for plausibility, one core with gloo over loopback: measured times
take its place.
"""


def device_named(name: str, **overrides: Any) -> Device:
    """The device of that name, with some of its figures replaced.

    Raises:
        UserError: there is no such device or no such figure.
    """
    if name not in DEVICES:
        raise UserError(f"device {name!r} is not known; known are {', '.join(DEVICES)}")
    unknown = sorted(overrides.keys() - Device.__dataclass_fields__.keys())
    if unknown:
        raise UserError(f"a device has no {', '.join(unknown)}")
    return replace(DEVICES[name], **overrides)


def this_device(device: torch.device) -> Device:
    """What is known of the device of this process; a GPU without an entry is taken for an H100.

    Args:
        device: CUDA (its own memory is taken) or CPU.
    """
    if device.type == "cpu":
        return DEVICES["cpu"]
    import torch  # late: a plan needs none

    properties = torch.cuda.get_device_properties(device)
    title = properties.name.lower()
    name = next((name for name in DEVICES if name != "cpu" and name in title), "h100")
    return device_named(name, memory_gb=properties.total_memory / 1e9)
