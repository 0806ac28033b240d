"""Output of `keel bench`: medians, spread, parts, and comparison with the roofline."""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace
from typing import Any

from keel_megatron.bench.step_time import PARTS, Roofline, Samples
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.times import predicted_times
from keel_megatron.runtime.tables import table_lines


def summary(ranks: list[Samples], roofline: Roofline) -> dict[str, Any]:
    """Results of one configuration, from the samples of all ranks.

    Times are medians over steps; for parts, the mean and the maximum over ranks.
    """
    first, devices = ranks[0], len(ranks)
    low, middle, high = statistics.quantiles(first.steps, n=4)
    parts = {part: [statistics.median(one.parts[part]) for one in ranks] for part in PARTS}
    tflops = first.flops / middle / devices / 1e12
    ideal = _ideal_seconds(first, roofline, devices)
    return {
        "name": first.name,
        "steps": len(first.steps),
        "step_seconds": middle,
        "quartiles": [low, high],
        "tokens_per_second": first.tokens / middle,
        "tflops_per_device": tflops,
        "mfu": tflops / roofline.tflops,
        "roofline_seconds": ideal,
        "attention": first.attention,
        "on_host": first.on_host,
        "predicted": None if first.predicted is None else asdict(first.predicted),
        "host_seconds": max(statistics.median(one.host) for one in ranks),
        "passes_seconds": max(statistics.median(one.passes) for one in ranks),
        "peak_memory_gb": max(one.peak_memory_gb for one in ranks),
        "checkpoint_stall_seconds": first.checkpoint_stall,
        "parts": {
            part: {"mean": statistics.mean(values), "largest": max(values)}
            for part, values in parts.items()
        },
        "loss": first.losses[-1],
    }


def _ideal_seconds(samples: Samples, roofline: Roofline, devices: int) -> float:
    """Roofline time of a step: products at the rate of the largest one, the rest at a copy's.

    Only arithmetic and memory access of the passes, divided evenly among the devices; without
    kernel launches, communication, pipeline bubble and optimizer.
    """
    config = samples.config
    device = replace(
        DEVICES["cpu"],
        name="measured",
        tflops=roofline.tflops,
        memory_bandwidth_gb=roofline.bandwidth_gb,
        intra_node_gb=float("inf"),
        intra_node_latency_us=0.0,
        matmul_fraction=1.0,
        cudnn_fraction=1.0,
        flash_fraction=1.0,
        fp8_fraction=1.0,
        bandwidth_fraction=1.0,
        strided_fraction=1.0,
        kernel_launch_us=0.0,
    )
    times = predicted_times(model_costs(config), device)
    sequences = config.training.global_batch_size / config.training.micro_batch_size
    one = times.embedding.total + times.head.total + config.model.blocks * times.block.total
    return one * sequences * config.parallel.tensor / devices


_AHEAD = 0.97
"""Host time relative to the device's, from which on the device waited for launches."""


def _bound(one: dict[str, Any]) -> str:
    """Which of host and device bounded the passes: a host that runs ahead finishes early."""
    return "host" if one["host_seconds"] > _AHEAD * one["passes_seconds"] else "device"


def _predicted(one: dict[str, Any]) -> str:
    """The plan's times of the passes on the slowest stage, and which bounds them."""
    found = one["predicted"]
    if found is None:
        return "-"
    return f"{found['device'] * 1e3:.1f}, {found['host'] * 1e3:.1f}: {found['bound']}"


def report(found: list[dict[str, Any]], roofline: Roofline, where: str) -> list[str]:
    """The results as lines; further configurations are compared with the first."""
    lines = [
        where,
        f"roofline here: {roofline.tflops:.3g} TFLOP/s in the largest product, "
        f"{roofline.bandwidth_gb:.3g} GB/s in the largest copy",
        "",
    ]
    rows: list[list[str]] = []

    def row(title: str, values: list[str]) -> None:
        rows.append([title, *values])

    row("step, ms (median)", [f"{one['step_seconds'] * 1e3:.1f}" for one in found])
    quartiles = [[f"{q * 1e3:.1f}" for q in one["quartiles"]] for one in found]
    row("  quartiles", ["-".join(pair) for pair in quartiles])
    if len(found) > 1:
        base = found[0]["step_seconds"]
        row("  ratio", [f"{one['step_seconds'] / base:.3f}" for one in found])
    row("tokens/s", [f"{one['tokens_per_second']:,.0f}" for one in found])
    row("model TFLOP/s per device", [f"{one['tflops_per_device']:.3g}" for one in found])
    row("MFU (of the largest product)", [f"{one['mfu']:.1%}" for one in found])
    row("roofline's step, ms", [f"{one['roofline_seconds'] * 1e3:.1f}" for one in found])
    if found[0]["on_host"]:
        row("host time", ["that of the passes: a CPU launches nothing"] * len(found))
    else:
        for title, key in (
            ("passes, ms on the device", "passes_seconds"),
            ("  until the host's last launch", "host_seconds"),
        ):
            row(title, [f"{one[key] * 1e3:.1f}" for one in found])
        row("  bound by", [_bound(one) for one in found])
        row("  predicted: device, host, ms", [_predicted(one) for one in found])
    row("attention", [one["attention"] for one in found])
    row("peak memory, GB (worst rank)", [f"{one['peak_memory_gb']:.3f}" for one in found])
    if any(one["checkpoint_stall_seconds"] is not None for one in found):
        stalls = [one["checkpoint_stall_seconds"] for one in found]
        row("checkpoint stall, ms", ["-" if s is None else f"{s * 1e3:.0f}" for s in stalls])
    row("parts, ms (mean of ranks, share)", [""] * len(found))
    for part in PARTS:
        cells = []
        for one in found:
            mean = one["parts"][part]["mean"]
            cells.append(f"{mean * 1e3:.1f} {mean / one['step_seconds']:4.0%}")
        row(f"  {part}", cells)
    return [*lines, *table_lines(["", *(one["name"] for one in found)], rows, left=[0])]
