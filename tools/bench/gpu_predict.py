"""The optimisations that are measured on one GPU, and `keel plan`'s prediction for each.

The prediction is the plan of the optimisation's settings (layout/times.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import Device
from keel_megatron.layout.times import GRAPH_GAP, time_parts
from keel_megatron.planner.plan import Plan, make_plan


def assumptions(device: Device) -> str:
    """The device's rules of thumb, in words."""
    gap = device.kernel_gap_us
    return (
        f"products at {device.matmul_fraction:.0%} of the peak; attention at "
        f"{device.attention_fraction:.0%} ({device.cudnn_fraction:.0%} in Transformer Engine); fp8 "
        f"products at {device.fp8_fraction:.0%} of twice the peak; memory at "
        f"{device.bandwidth_fraction:.0%} of its bandwidth, the rotary embedding at "
        f"{device.strided_fraction:.0%}; a gap of {gap:g} us behind every kernel of a stream and "
        f"{gap * GRAPH_GAP:g} us within a graph; the host "
        f"takes {device.kernel_launch_us:g} us a kernel"
    )


def plan_of(config: RunConfig, device: Device) -> Plan:
    """The plan of a lever's run on one device."""
    return make_plan(config, 1, device)


def step_parts(plan: Plan) -> dict[str, float]:
    """Seconds of a step on one device by what they go to; together they are the step."""
    (stage,), costs = plan.partition.stages, plan.partition.costs
    again = sum(stage.recomputed)
    passes = ((costs.block.forward, stage.blocks + again), (costs.block.backward, stage.blocks))
    parts: dict[str, float] = {}
    for work, count in passes:
        for name, seconds in time_parts(work, plan.device, costs.block.execution).items():
            title = f"blocks: {name}"
            parts[title] = parts.get(title, 0.0) + plan.micro_batches * count * seconds
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    times = plan.partition.times
    parts["head and loss"] = plan.micro_batches * times.head.total
    parts["embedding"] = plan.micro_batches * times.embedding.total
    return parts | {"optimizer": plan.closing_seconds}


@dataclass(frozen=True)
class Lever:
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
LEVERS: tuple[Lever, ...] = (
    Lever("base: Keel", (), "local modules, the fused kernel, micro-batch 1"),
    Lever(
        "Pre-LN",
        ("model.residual=pre_ln",),
        "as much data in the fused kernel; two norm gradients less (aim: Keel at most 1.02 of it)",
    ),
    Lever(
        "joins in torch's operators",
        ("kernels.triton=[rotary,swiglu,cross_entropy]",),
        "every operator reads and writes the stream again",
    ),
    Lever(
        "rotary in torch's operators",
        ("kernels.triton=[norm,swiglu,cross_entropy]",),
        "seven strided kernels each way in place of one",
    ),
    Lever(
        "SwiGLU in torch's operators",
        ("kernels.triton=[norm,rotary,cross_entropy]",),
        "two kernels forward and four backward in place of one, and twice the memory access",
    ),
    Lever(
        "loss in torch's operators",
        ("kernels.triton=[norm,rotary,swiglu]",),
        "32 bytes a logit beside the products in place of 6, and fp32 logits in memory",
    ),
    Lever(
        "compile",
        ("kernels.compile=true",),
        "norm weights' gradients are summed in a separate pass; rotary is fused without it",
        seconds=240,
    ),
    Lever(
        "CUDA graphs",
        ("kernels.cuda_graphs=true",),
        "at 4,096 tokens the host is not expected to be the limit; shorter gaps remain",
        seconds=180,
    ),
    Lever(
        "compile and CUDA graphs",
        ("kernels.compile=true", "kernels.cuda_graphs=true"),
        "fewer kernels with shorter gaps",
        seconds=240,
    ),
    Lever("micro-batch 2", (MICRO.format(2),), "half the gaps and weights' sums a token"),
    Lever("micro-batch 4", (MICRO.format(4),), "a quarter of them"),
    Lever(
        "loss in pieces",
        ("kernels.logits_mib=512",),
        "the head's product made again; a quarter of the logits in memory",
    ),
    Lever("recompute", ("parallel.recompute=full",), "one forward pass more"),
    Lever(
        "Transformer Engine",
        (TE,),
        "cuDNN's attention",
        needs="transformer_engine.pytorch",
    ),
    Lever(
        "Transformer Engine, fp8",
        (TE, "kernels.fp8=hybrid"),
        "products twice as fast; but operands are read twice more to be cast, and launching the "
        "casts keeps the host busy for longer than the device",
        needs="transformer_engine.pytorch",
        seconds=180,
    ),
)
