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
    measured_tflops: float
    """Largest published rate of bf16 products measured on it, 1e12 FLOP/s."""
    memory_gb: float | None
    """Memory, 1e9 bytes; None = no limit is known."""
    reserved_gb: float
    """Memory not available to the model: driver context, NCCL and cuBLAS buffers, fragmentation."""
    memory_bandwidth_gb: float
    """Memory bandwidth, 1e9 bytes/s."""
    intra_node_gb: float
    """Bandwidth to a device of the same node, in one direction, 1e9 bytes/s."""
    intra_node_latency_us: float
    """Latency within a node, microseconds."""
    inter_node_gb: float
    """Bandwidth to a device of another node, in one direction, 1e9 bytes/s."""
    inter_node_latency_us: float
    """Latency between nodes, microseconds."""
    devices_per_node: int
    matmul_fraction: float
    """Fraction of the peak that a bf16 product approaches as it gets larger."""
    matmul_setup_us: float
    """Time of a product besides its multiplications, microseconds."""
    matmul_setup_k: float
    """Time to write a product's results, in multiplications per result."""
    cudnn_fraction: float
    """Fraction of the peak that cuDNN's causal attention reaches at head size 64, forward and
    backward together."""
    flash_fraction: float
    """The same for FlashAttention-2."""
    cudnn_first: bool
    """Whether `kernels.attention: auto` chooses cuDNN."""
    fp8_fraction: float
    """Fraction of the fp8 peak (twice that of bf16) that fp8 products approach."""
    bandwidth_fraction: float
    """Fraction of the memory bandwidth that element-wise kernels reach."""
    strided_fraction: float
    """The same for the rotary embedding, whose accesses are strided and not vectorised."""
    kernel_gap_us: float
    """Idle time after each kernel, microseconds."""
    kernel_launch_us: float
    """Host time to launch a kernel, microseconds. Without `asynchronous`: the least time of an
    operator."""
    python_scale: float
    """Host time of Python and autograd, relative to the calibration (layout/host_times.py)."""
    asynchronous: bool
    """Whether the device runs kernels while the host launches the next ones."""


_GPU: dict[str, Any] = {
    "matmul_setup_us": 6.1,
    "matmul_setup_k": 117.0,
    "bandwidth_fraction": 0.85,
    "strided_fraction": 0.31,
    "kernel_gap_us": 1.2,
    "kernel_launch_us": 5.0,
    "python_scale": 1.0,
    "asynchronous": True,
}
_HOPPER: dict[str, Any] = _GPU | {
    "matmul_fraction": 0.852,
    "cudnn_fraction": 0.373,
    "flash_fraction": 0.259,
    "cudnn_first": True,
    "fp8_fraction": 0.73,
}
_AMPERE: dict[str, Any] = _GPU | {
    "matmul_fraction": 0.869,
    "cudnn_fraction": 0.41,
    "flash_fraction": 0.5,
    "cudnn_first": False,
    "fp8_fraction": 0.5,
}
_BLACKWELL: dict[str, Any] = _GPU | {
    "matmul_fraction": 0.776,
    "cudnn_fraction": 0.34,
    "flash_fraction": 0.12,
    "cudnn_first": True,
    "fp8_fraction": 0.76,
}
_CPU: dict[str, Any] = {
    "matmul_fraction": 0.8,
    "matmul_setup_us": 0.0,
    "matmul_setup_k": 0.0,
    "cudnn_fraction": 0.8,
    "flash_fraction": 0.8,
    "cudnn_first": False,
    "fp8_fraction": 0.8,
    "bandwidth_fraction": 0.5,
    "strided_fraction": 0.5,
    "kernel_gap_us": 0.0,
    "kernel_launch_us": 25.0,
    "python_scale": 0.0,
    "asynchronous": False,
}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h200", 989.0, 794.5, 150.1, 4.0, 4800.0, 450.0, 8.0, 50.0, 20.0, 8, **_HOPPER),
        Device("h100", 989.0, 794.5, 85.0, 4.0, 3350.0, 450.0, 8.0, 50.0, 20.0, 8, **_HOPPER),
        Device("a100", 312.0, 271.2, 85.0, 4.0, 2039.0, 300.0, 8.0, 25.0, 20.0, 8, **_AMPERE),
        Device("b200", 2250.0, 1745.0, 191.5, 4.0, 8000.0, 900.0, 8.0, 50.0, 20.0, 8, **_BLACKWELL),
        Device("cpu", 0.12, 0.096, None, 0.0, 40.0, 1.0, 100.0, 1.0, 200.0, 64, **_CPU),
    )
}
"""Devices by name.

Peaks, memory bandwidth and NVLink (half of the two-way figure) are from NVIDIA's data sheets of
the H200 SXM, H100 SXM, A100 80GB SXM and B200 (HGX), without sparsity. Memory is what torch shows
of them (139.8, 79.2, 79.2 and 178.4 GiB), which is not the name's figure. Between nodes
each GPU has one 400 Gb/s port (A100: 200 Gb/s). `SOURCES` says where the rates come from; steps
on one H200 were compared with them (layout/times.py). `cpu` is a rough estimate of one core with
gloo over loopback; `keel plan --measure` replaces it.
"""

_MAMF = "github.com/stas00/ml-engineering, compute/accelerator, Maximum Achievable Matmul FLOPS"
SOURCES: dict[str, str] = {
    "measured_tflops": f"published: the largest rate of any shape, {_MAMF} (torch 2.6 and 2.7); "
    "an H200 equals an H100",
    "matmul_fraction": "published for Hopper: fitted, with `matmul_setup_us` and "
    "`matmul_setup_k`, to 44 products measured on an H100 (openxla/xla, "
    "xla/service/gpu/model/matmul_interpolator_data.h), root mean square error 2.6 %, largest "
    "9.4 %; A100 and B200: their largest measured rate, and a Hopper's setup (estimates)",
    "cudnn_fraction": "published for Hopper: FlashAttention-3 (arXiv:2407.08608), H100, head size "
    "64, sequence 4096: forward, causal 363 TFLOP/s; backward, without a mask 417, of which 0.89 "
    "(forward's ratio with a mask) is an estimate. A100: 0.82 of FlashAttention-2 "
    "(huggingface/transformers#48163). B200: forward 769 TFLOP/s (Dao-AILab/flash-attention#2605); "
    "backward as fast is an estimate",
    "flash_fraction": "published for Hopper: the same figures, 284 forward, and 279 without a mask "
    "backward, of which 0.885 is an estimate. A100 and B200: estimates",
    "fp8_fraction": f"published: {_MAMF}, fp8; eager casts are counted apart",
    "bandwidth_fraction": "estimate",
    "strided_fraction": "estimate",
    "kernel_gap_us": "estimate; half of it within a CUDA graph",
    "kernel_launch_us": "estimate for a fast host: dispatch to the driver and Triton's launcher "
    "take 3 to 8 us. Measured beside an H200 (16 cores of an Intel Xeon, virtual machine, torch "
    "2.11, 2026-11-26): a Triton kernel 24 us, a product 23, an addition in place 15, attention 54",
}
"""Source of each rate: a publication, or an estimate."""


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
