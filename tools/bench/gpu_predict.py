"""The options that are measured on one GPU, and `keel plan`'s prediction for each.

The prediction is the plan of the option's settings (layout/times.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import SOURCES, Device
from keel_megatron.layout.host_times import calibration
from keel_megatron.layout.times import GRAPH_GAP, time_parts
from keel_megatron.planner.plan import Plan, make_plan

MICRO_BATCHES = (1, 2, 4, 8)
REASONS = {
    "blocks: products": "12 of a block; each a fraction of the peak, a constant and a part per "
    "result, fitted to published measurements",
    "blocks: attention": "cuDNN's kernel at head size 64, published",
    "blocks: rotary": "strided accesses of torch's operators",
    "blocks: other memory access": "joins, SwiGLU, rotary, and the weights' fp32 sums, which are "
    "read and written once per micro-batch",
    "blocks: gaps": "the device idles after each kernel",
    "head and loss": "three products with the vocabulary, and 6 bytes a logit",
    "embedding": "dense gradients: written, and added to the fp32 sums",
    "optimizer": "46 bytes a parameter: zeroing, norm, AdamW, the copy to bf16",
    "waiting for the host": "Python and launches take longer than the device",
}
"""Why a part of a step takes its time."""


def assumptions(device: Device) -> list[str]:
    """The device's rates and their sources, a line each."""
    gap, host = device.kernel_gap_us, calibration()
    python = host.blocks["keel"]
    values = {
        "measured_tflops": f"{device.measured_tflops:g} TFLOP/s: the measured product rate",
        "matmul_fraction": f"products: {device.matmul_fraction:.1%} of the peak of "
        f"{device.tflops:g} TFLOP/s, and {device.matmul_setup_us:g} us each, and "
        f"{device.matmul_setup_k:g} multiplications per result",
        "cudnn_fraction": f"cuDNN's attention: {device.cudnn_fraction:.1%} of the peak, both "
        "passes together",
        "flash_fraction": f"FlashAttention-2: {device.flash_fraction:.1%}",
        "fp8_fraction": f"fp8 products: {device.fp8_fraction:.0%} of twice the peak",
        "bandwidth_fraction": f"memory: {device.bandwidth_fraction:.0%} of its bandwidth",
        "strided_fraction": f"rotary embedding in torch's operators: {device.strided_fraction:.0%}",
        "kernel_gap_us": f"gap behind a kernel: {gap:g} us, {gap * GRAPH_GAP:g} us within a graph",
        "kernel_launch_us": f"a launch: {device.kernel_launch_us:g} us of the host",
    }
    lines = [f"{text} ({SOURCES[name]})" for name, text in values.items()]
    return [
        *lines,
        f"Python and autograd: {python.forward * 1e6:.0f} us a block forward, "
        f"{python.backward * 1e6:.0f} us backward (`python tools/bench/host.py`, {host.machine}, "
        f"{host.date})",
    ]


def plan_of(config: RunConfig, device: Device) -> Plan:
    """The plan of an option's run on one device."""
    return make_plan(config, 1, device)


def step_parts(plan: Plan) -> dict[str, float]:
    """Seconds of a step on one device by what they go to; together they are the step."""
    (stage,), costs = plan.partition.stages, plan.partition.costs
    full, light = sum(stage.recomputed), sum(stage.light)
    passes = (
        (costs.block.forward, stage.blocks + full),
        (costs.block.backward, stage.blocks),
        (costs.block.light, light),
    )
    parts: dict[str, float] = {}
    for work, count in passes:
        for name, seconds in time_parts(work, plan.device, costs.block.execution).items():
            title = f"blocks: {name}"
            parts[title] = parts.get(title, 0.0) + plan.micro_batches * count * seconds
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    times = plan.partition.times
    parts["head and loss"] = plan.micro_batches * times.head.total
    parts["embedding"] = plan.micro_batches * times.embedding.total
    waiting = plan.micro_batches * (stage.times.longer.total - stage.times.device.total)
    parts |= {"waiting for the host": waiting} if waiting else {}
    return parts | {"optimizer": plan.closing_seconds}


def best_settings(runs: dict[str, RunConfig], device: Device) -> str:
    """Of runs by name, the one whose predicted step is the shortest and fits in memory."""
    plans = {name: plan_of(config, device) for name, config in runs.items()}
    return min(
        (name for name, plan in plans.items() if plan.fits),
        key=lambda name: plans[name].step_seconds,
    )


@dataclass(frozen=True)
class Option:
    """A variant beside the base, and what should come of it."""

    name: str
    settings: tuple[str, ...]
    why: str
    needs: str = ""
    """A package without which it is left out."""
    seconds: int = 110
    """After which it is given up."""


MICRO = "training.micro_batch_size={}"
TE = "kernels.backend=transformer_engine"
OPTIONS: tuple[Option, ...] = (
    Option("base: Keel", (), "local modules, the Triton kernels, micro-batch 4"),
    Option(
        "Pre-LN",
        ("model.residual=pre_ln",),
        "as much data in the fused kernel; two norm gradients less",
    ),
    Option(
        "micro-batch 1",
        (MICRO.format(1),),
        "the host launches four times as many kernels, and the weights' sums are read and written "
        "four times",
    ),
    Option(
        "micro-batch 1, CUDA graphs",
        (MICRO.format(1), "kernels.cuda_graphs=true"),
        "the host is not the limit any more",
        seconds=180,
    ),
    Option("micro-batch 2", (MICRO.format(2),), "twice as many kernels and sums"),
    Option("micro-batch 8", (MICRO.format(8),), "half the kernels and sums"),
    Option(
        "CUDA graphs",
        ("kernels.cuda_graphs=true",),
        "shorter gaps; blocks take the host no time, which is not the limit here",
        seconds=180,
    ),
    Option(
        "joins in torch's operators",
        ("kernels.triton=[rotary,swiglu,cross_entropy]",),
        "every operator reads and writes the stream again",
    ),
    Option(
        "rotary in torch's operators",
        ("kernels.triton=[norm,swiglu,cross_entropy]",),
        "seven strided kernels each way in place of one",
    ),
    Option(
        "SwiGLU in torch's operators",
        ("kernels.triton=[norm,rotary,cross_entropy]",),
        "two kernels forward and four backward in place of one, and twice the memory access",
    ),
    Option(
        "loss in torch's operators",
        ("kernels.triton=[norm,rotary,swiglu]",),
        "32 bytes a logit beside the products in place of 6, and fp32 logits in memory",
    ),
    Option(
        "FlashAttention-2",
        ("kernels.attention=flash",),
        "slower than cuDNN's kernel on Hopper",
    ),
    Option(
        "loss in pieces",
        ("kernels.logits_mib=512",),
        "the head's product made again; a quarter of the logits in memory",
    ),
    Option(
        "light recomputation",
        ("parallel.recompute=light",),
        "SwiGLU and the inner norms again; a quarter of the activations less",
    ),
    Option("recompute", ("parallel.recompute=full",), "one forward pass more"),
    Option(
        "Muon",
        ("optimizer.name=muon",),
        "each matrix is orthogonalised, in five iterations of three products",
    ),
    Option(
        "Transformer Engine",
        (TE,),
        "the same attention kernel and products",
        needs="transformer_engine.pytorch",
    ),
    Option(
        "Transformer Engine, fp8",
        (TE, "kernels.fp8=hybrid"),
        "products almost twice as fast; but operands are read twice more to be cast, and the "
        "casts are 24 more launches a block",
        needs="transformer_engine.pytorch",
        seconds=180,
    ),
    Option(
        "compile",
        ("kernels.compile=true",),
        "slower on the device, faster on the host; see below",
        seconds=120,
    ),
)
