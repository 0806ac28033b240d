"""Device properties for predictions of time and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keel_megatron.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A device and its interconnect; every property can be overridden (`device_named`)."""

    name: str
    tflops: float
    """Peak of dense bf16 matrix products, 1e12 FLOP/s."""
    memory_gb: float | None
    """Memory, 1e9 bytes; None = no limit is known."""
    reserved_gb: float
    """Memory not available to the model: driver context, NCCL and cuBLAS buffers, fragmentation."""
    memory_bandwidth_gb: float
    """Memory bandwidth, 1e9 bytes/s."""
    intra_node_gb: float
    """Bandwidth to a device of the same node, in one direction, 1e9 bytes/s."""
    intra_node_latency_us: float
    """Latency within a node, seconds."""
    inter_node_gb: float
    """Bandwidth to a device of another node, in one direction, 1e9 bytes/s."""
    inter_node_latency_us: float
    """Latency between nodes, seconds."""
    devices_per_node: int
    matmul_fraction: float
    """Fraction of the peak that large matrix products reach."""
    attention_fraction: float
    """Fraction of the peak that torch's causal attention reaches at head size 64."""
    cudnn_fraction: float
    """The same for Transformer Engine's attention."""
    fp8_fraction: float
    """Fraction of the fp8 peak (twice that of bf16) that fp8 products reach."""
    bandwidth_fraction: float
    """Fraction of the memory bandwidth that element-wise kernels reach."""
    strided_fraction: float
    """The same for the rotary embedding, whose accesses are strided and not vectorised."""
    kernel_gap_us: float
    """Idle time after each kernel, seconds."""
    kernel_launch_us: float
    """Host time per kernel including Python and autograd, seconds; a lower bound of its time."""


_GPU_HOPPER = (0.65, 0.35, 0.5, 0.5, 0.85, 0.31, 1.2, 20.0)
_GPU_AMPERE = (0.75, 0.5, 0.5, 0.5, 0.85, 0.31, 1.2, 20.0)
_CPU = (0.8, 0.8, 0.8, 0.8, 0.5, 0.5, 0.0, 25.0)
"""Fractions (products, attention, cuDNN's, fp8's, bandwidth, strided), a kernel's gap and
its launch."""

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h200", 989.0, 150.1, 4.0, 4800.0, 450.0, 8.0, 50.0, 20.0, 8, *_GPU_HOPPER),
        Device("h100", 989.0, 85.0, 4.0, 3350.0, 450.0, 8.0, 50.0, 20.0, 8, *_GPU_HOPPER),
        Device("a100", 312.0, 85.0, 4.0, 2039.0, 300.0, 8.0, 25.0, 20.0, 8, *_GPU_AMPERE),
        Device("b200", 2250.0, 191.5, 4.0, 8000.0, 900.0, 8.0, 50.0, 20.0, 8, *_GPU_HOPPER),
        Device("cpu", 0.12, None, 0.0, 40.0, 1.0, 100.0, 1.0, 200.0, 64, *_CPU),
    )
}
"""Devices by name.

Peaks, memory bandwidth and NVLink (half of the two-way figure) are from NVIDIA's data sheets of
the H200 SXM, H100 SXM, A100 80GB SXM and B200 (HGX), without sparsity. Memory is what torch shows
of them (139.8, 79.2, 79.2 and 178.4 GiB), which is not the name's figure. Between nodes
each GPU has one 400 Gb/s port (A100: 200 Gb/s). The fractions, latencies,
reserved memory, gaps and launch times are rules of thumb for eager PyTorch, not measurements: none
was measured on a GPU. `cpu` is a rough estimate of one core with gloo over loopback;
`keel plan --measure` replaces it.
"""


def device_named(name: str, **overrides: Any) -> Device:
    """The device of that name, with some properties replaced.

    Raises:
        UserError: there is no such device or property.
    """
    if name not in DEVICES:
        raise UserError(f"unknown device {name!r}; must be one of {', '.join(DEVICES)}")
    unknown = sorted(overrides.keys() - Device.__dataclass_fields__.keys())
    if unknown:
        raise UserError(f"a device has no property {', '.join(unknown)}")
    return replace(DEVICES[name], **overrides)


_SAME_MEMORY = 0.01
"""Difference between memory sizes of one model of GPU, from driver to driver, as a fraction."""


def this_device(device: torch.device) -> Device:
    """Properties of this process's device; an unknown GPU gets the properties of an H100.

    A memory size that differs from that of `DEVICES` by the driver only is taken from there: then
    all ranks compute the layout that `keel plan` shows.

    Args:
        device: CUDA (with the memory that it has) or CPU.
    """
    if device.type == "cpu":
        return DEVICES["cpu"]
    import torch  # late: a plan needs none

    properties = torch.cuda.get_device_properties(device)
    title = properties.name.lower()
    name = next((name for name in DEVICES if name != "cpu" and name in title), "h100")
    known, found = DEVICES[name], properties.total_memory / 1e9
    assert known.memory_gb is not None
    same = abs(found / known.memory_gb - 1) < _SAME_MEMORY
    return known if same else replace(known, memory_gb=found)
