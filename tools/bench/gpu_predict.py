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
    "blocks: products": "12 matrix products per block; each takes a fraction of the peak rate, a "
    "constant and a time per result, fitted to published measurements",
    "blocks: attention": "cuDNN's kernel at head size 64, published",
    "blocks: rotary": "strided accesses of torch's operators",
    "blocks: other memory access": "joins (scaled add + norms), SwiGLU, rotary, and the fp32 "
    "weight gradients, which are read and written once per micro-batch",
    "blocks: gaps": "the device is idle after each kernel",
    "head and loss": "three matrix products with the vocabulary, and 6 bytes per logit",
    "embedding": "dense gradients are written, and added to the fp32 gradients",
    "optimizer": "46 bytes per parameter: zeroing, norm, AdamW, the copy to bf16",
    "waiting for the host": "Python and kernel launches take longer than the device",
}
"""Why a part of a step takes its time."""


def assumptions(device: Device) -> list[str]:
    """The device's rates and their sources, a line each."""
    gap, host = device.kernel_gap_us, calibration()
    python = host.blocks["keel"]
    values = {
        "measured_tflops": f"{device.measured_tflops:g} TFLOP/s: the measured product rate",
        "matmul_fraction": f"matrix products: {device.matmul_fraction:.1%} of the peak of "
        f"{device.tflops:g} TFLOP/s, plus {device.matmul_setup_us:g} us each and the time of "
        f"{device.matmul_setup_k:g} multiplications per result",
        "cudnn_fraction": f"cuDNN's attention: {device.cudnn_fraction:.1%} of the peak, both "
        "passes together",
        "flash_fraction": f"FlashAttention-2: {device.flash_fraction:.1%} of the peak",
        "fp8_fraction": f"fp8 matrix products: {device.fp8_fraction:.0%} of twice the peak",
        "bandwidth_fraction": f"memory: {device.bandwidth_fraction:.0%} of its bandwidth",
        "strided_fraction": "rotary embedding in torch's operators: "
        f"{device.strided_fraction:.0%} of the memory bandwidth",
        "kernel_gap_us": f"gap after a kernel: {gap:g} us, {gap * GRAPH_GAP:g} us within a graph",
        "kernel_launch_us": f"a kernel launch: {device.kernel_launch_us:g} us of host time",
    }
    lines = [f"{text} ({SOURCES[name]})" for name, text in values.items()]
    return [
        *lines,
        f"Python and autograd: {python.forward * 1e6:.0f} us per block forward, "
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
    """A variant of the base, and its expected effect."""

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
    Option("base: Keel", (), "Megatron-core's local layers, Triton kernels, micro-batches of 4"),
    Option(
        "Pre-LN",
        ("model.residual=pre_ln",),
        "the fused kernel reads and writes as much; two norm gradients fewer",
    ),
    Option(
        "micro-batch 1",
        (MICRO.format(1),),
        "the host launches four times as many kernels, and the fp32 weight gradients are read and "
        "written four times",
    ),
    Option(
        "micro-batch 1, CUDA graphs",
        (MICRO.format(1), "kernels.cuda_graphs=true"),
        "the host no longer limits the step",
        seconds=180,
    ),
    Option("micro-batch 2", (MICRO.format(2),), "twice as many kernels and gradient accumulations"),
    Option("micro-batch 8", (MICRO.format(8),), "half as many kernels and gradient accumulations"),
    Option(
        "CUDA graphs",
        ("kernels.cuda_graphs=true",),
        "shorter gaps between kernels; blocks take no host time, which is not the limit here",
        seconds=180,
    ),
    Option(
        "joins in torch's operators",
        ("kernels.triton=[rotary,swiglu,cross_entropy]",),
        "scaled add + norms: every operator reads and writes the residual stream again",
    ),
    Option(
        "rotary in torch's operators",
        ("kernels.triton=[norm,swiglu,cross_entropy]",),
        "seven strided kernels in each pass instead of one",
    ),
    Option(
        "SwiGLU in torch's operators",
        ("kernels.triton=[norm,rotary,cross_entropy]",),
        "two kernels forward and four backward instead of one each, and twice the memory access",
    ),
    Option(
        "loss in torch's operators",
        ("kernels.triton=[norm,rotary,swiglu]",),
        "32 bytes per logit instead of 6, beside the matrix products, and fp32 logits in memory",
    ),
    Option(
        "FlashAttention-2",
        ("kernels.attention=flash",),
        "slower than cuDNN's kernel on Hopper",
    ),
    Option(
        "loss in pieces",
        ("kernels.logits_mib=512",),
        "the head's matrix product is computed twice; a quarter of the logits in memory",
    ),
    Option(
        "light recomputation",
        ("parallel.recompute=light",),
        "SwiGLU and the inner norms are recomputed; a quarter less activation memory",
    ),
    Option("recompute", ("parallel.recompute=full",), "one more forward pass"),
    Option(
        "Muon",
        ("optimizer.name=muon",),
        "each matrix is orthogonalised, in five iterations of three matrix products",
    ),
    Option(
        "Transformer Engine",
        (TE,),
        "the same attention kernel and matrix products",
        needs="transformer_engine.pytorch",
    ),
    Option(
        "Transformer Engine, fp8",
        (TE, "kernels.fp8=hybrid"),
        "matrix products almost twice as fast; but operands are read two more times for the casts, "
        "which are 24 more launches per block",
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
