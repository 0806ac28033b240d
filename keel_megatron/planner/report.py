"""Text output of a plan and of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keel_megatron.layout.costs import head_pieces
from keel_megatron.layout.host_times import calibration
from keel_megatron.layout.memory import GB
from keel_megatron.layout.stage_table import stage_table
from keel_megatron.layout.times import SLOW_HOST
from keel_megatron.planner.plan import Plan
from keel_megatron.planner.search import Candidate, Found
from keel_megatron.runtime.tables import count, table_lines


def describe(plan: Plan) -> str:
    """The whole plan as text."""
    stages = _indented(stage_table(plan.partition, memory_by_kind=True))
    parts = [_headline(plan), "", stages, "", _pieces(plan), *_prediction(plan)]
    return "\n".join(parts)


def layout_words(plan: Plan) -> str:
    """The layout in one line."""
    parallel, training = plan.config.parallel, plan.config.training
    words = f"TP {parallel.tensor}{' + SP' if parallel.sequence else ''} x PP {parallel.pipeline}"
    if parallel.virtual_pipeline > 1:
        words += f" x VPP {parallel.virtual_pipeline}"
    return (
        f"{words} x DP {plan.data_parallel}, {count(plan.micro_batches, 'micro-batch')} of "
        f"{count(training.micro_batch_size, 'sequence')}"
    )


def _headline(plan: Plan) -> str:
    model, data, training = plan.config.model, plan.config.data, plan.config.training
    nodes = -(-plan.gpus // plan.device.devices_per_node)
    where = f"{plan.gpus:,} x {plan.device.name}"
    where += f" on {count(nodes, 'node')}" if nodes > 1 else ""
    return (
        f"{training.name}: {count(model.blocks, 'block')} ({model.sub_layers:,} sub-layers) of "
        f"hidden size {model.hidden_size:,}, {si(plan.parameters)} parameters, vocabulary "
        f"{data.vocab_size:,}\n"
        f"{where}: {layout_words(plan)} of {data.seq_length:,} tokens"
    )


def _pieces(plan: Plan) -> str:
    times, parts = plan.partition.times, plan.partition
    slowest = parts.slowest
    how = "measured" if plan.measured else "predicted"
    cut = ""
    if plan.measured and plan.config.parallel.layout is None:
        counts = ",".join(str(chunk.blocks) for chunk in parts.layout.chunks)
        cut = f"\nkeel train uses predicted times; for this balance, parallel.layout=[{counts}]."
    head = head_pieces(plan.config)
    pieces = f" (in {head} pieces, with recomputed logits)" if head > 1 else ""
    return (
        f"A block takes {seconds(times.block.total)} per micro-batch ({how}), the head as long as "
        f"{times.head.total / times.block.total:.1f} blocks{pieces}, the embedding as "
        f"{times.embedding.total / times.block.total:.1f}.\n"
        f"Slowest: stage {slowest.number} with {seconds(slowest.seconds)} per micro-batch, "
        f"{parts.balance - 1.0:.1%} above perfect balance.{cut}"
    )


def _prediction(plan: Plan) -> list[str]:
    low, high = plan.spread.low, plan.spread.high
    lines = [
        *_device_and_host(plan),
        f"Step: {seconds(plan.step_seconds)}: passes {seconds(plan.timeline.seconds)} with a "
        f"bubble of {plan.bubble:.1%}, gradients and update {seconds(plan.closing_seconds)}.",
        f"Between {' and '.join(map(seconds, plan.step_range))}: {plan.basis}.",
        f"Speed: {si(plan.tokens_per_second)} tokens/s, {plan.mfu:.1%} MFU of "
        f"{plan.device.tflops:g} TFLOP/s ({plan.mfu / high:.0%} to {plan.mfu / low:.0%})"
        f"{_products(plan)}.",
        f"Run: {count(plan.config.training.steps, 'step')}, {si(plan.run_tokens)} tokens: "
        f"{duration(plan.run_seconds)}.",
        *_rampup(plan),
    ]
    lines.append(_memory(plan))
    if plan.config.training.engine == "deepspeed":
        lines.append(_zero(plan))
    return lines


def _rampup(plan: Plan) -> list[str]:
    """How the batch grows; nothing where it does not. The step above has the full batch."""
    sizes, steps = plan.config.batch_sizes, plan.config.training.steps
    if not sizes.increments:
        return []
    phases = list(sizes.phases(steps))
    growing = sum(phase.steps for phase in phases if phase.size < sizes.full)
    return [
        f"Batch: from {count(sizes.start, 'sequence')} to {phases[-1].size:,} over the first "
        f"{count(growing, 'step')} ({si(sizes.samples_of(growing) * plan.config.data.seq_length)} "
        "tokens); the step above has the full batch."
    ]


def _products(plan: Plan) -> str:
    """The share of the device's measured product rate, where there is a published one."""
    if plan.device.name == "cpu":
        return ""
    measured = plan.device.measured_tflops
    return f", {plan.product_share:.1%} of the {measured:g} that the largest products reach"


def _device_and_host(plan: Plan) -> list[str]:
    """Which of both bounds the slowest stage; nothing where they are one, or measured."""
    times, scale = plan.partition.slowest.times, plan.device.python_scale
    if not times.host.total:
        return []
    calibrated = calibration()
    by = f" x {scale:g}" if scale != 1.0 else ""
    slow = ""
    if times.host.total < times.device.total < SLOW_HOST * times.host.total:
        slow = (
            f" On a host {SLOW_HOST:g} times as slow (docs/benchmarks/gpu.md) the host would; "
            "larger micro-batches or kernels.cuda_graphs need less of it."
        )
    return [
        f"A micro-batch takes the slowest stage's device {seconds(times.device.total)} and its "
        f"host {seconds(times.host.total)} (Python as on {calibrated.machine}, "
        f"{calibrated.date}{by}): the {times.bound} bounds the step.{slow}"
    ]


def _memory(plan: Plan) -> str:
    """Whether a step fits."""
    parts, worst = plan.partition, plan.partition.worst_memory
    need = f"stage {worst.number} needs {worst.memory.total / GB:.1f} GB"
    if parts.limit_bytes is None:
        return f"Memory: {need}; no limit."
    limit = parts.limit_bytes
    if parts.fits:
        return f"Memory: fits; {need} of {limit / GB:.4g}."
    over = sum(stage.memory.total > limit for stage in parts.stages)
    return (
        f"Memory: DOES NOT FIT; {need} of {limit / GB:.4g}; {over} of "
        f"{count(len(parts.stages), 'stage')} need more."
    )


def _zero(plan: Plan) -> str:
    """Host memory of DeepSpeed, and what the prediction leaves out."""
    own, host = plan.config.deepspeed, plan.partition.worst_memory.memory.host
    ranks = min(plan.gpus, plan.device.devices_per_node)
    node = f", {host * ranks / GB:.1f} GB per node of {ranks}" if host and ranks > 1 else ""
    return (
        f"ZeRO {own.zero_stage}: {host / GB:.1f} GB of host memory per device{node}. The times "
        "are those of the Megatron engine, without gathering parameters, reducing gradients per "
        "micro-batch and updating on the host."
    )


def describe_change(change: tuple[list[str], Plan] | None) -> str:
    """The change with which a plan fits, as text."""
    if change is None:
        return "No similar layout fits; `--search` tries all layouts."
    overrides, plan = change
    worst = plan.partition.worst_memory
    return (
        f"The smallest change that fits: {' '.join(overrides)} ({plan.gpus:,} devices, "
        f"{worst.memory.total / GB:.1f} GB, {si(plan.tokens_per_second)} tokens/s)."
    )


def describe_search(found: Found, gpus: int) -> str:
    """The best layouts, and why the best one is the fastest, as text."""
    header = ["", "TP", "PP", "VPP", "DP", "micro", "recompute", "bubble", "GB", "step"]
    rows = []
    for rank, one in enumerate(found.best, start=1):
        plan, parallel = one.plan, one.plan.config.parallel
        mfu = plan.mfu_at(one.tokens_per_second)
        rows.append(
            [
                str(rank),
                *(str(parallel.tensor), str(parallel.pipeline), str(parallel.virtual_pipeline)),
                *(str(plan.data_parallel), str(plan.config.training.micro_batch_size)),
                *(one.recompute, f"{one.bubble:.1%}"),
                f"{plan.partition.worst_memory.memory.total / GB:.1f}",
                *(seconds(one.step_seconds), si(one.tokens_per_second), f"{mfu:.1%}"),
                f"{plan.gpus:,}",
            ]
        )
    best = found.best[0]
    low, high = best.plan.spread.low - 1.0, best.plan.spread.high - 1.0
    lines = [
        f"{found.tried:,} layouts on up to {gpus:,} x {best.plan.device.name}, "
        f"{found.fitting:,} of them fit. The best by tokens/s:",
        _indented(table_lines([*header, "tokens/s", "MFU", "devices"], rows)),
        f"Times are {best.plan.basis}; range of the best: {low:+.0%} to {high:+.0%}.",
        *([_why(best, found.best[1])] if len(found.best) > 1 else []),
    ]
    if best.plan.gpus < gpus:
        lines.append(
            f"It leaves {gpus - best.plan.gpus:,} devices idle: the global batch of "
            f"{best.plan.config.training.global_batch_size:,} sequences does not divide among more."
        )
    return "\n".join(lines)


def search_object(found: Found) -> dict[str, Any]:
    """The best layouts as a JSON object."""
    return {
        "tried": found.tried,
        "fitting": found.fitting,
        "best": [
            {
                "overrides": one.overrides,
                "gpus": one.plan.gpus,
                "data_parallel": one.plan.data_parallel,
                "recompute": one.recompute,
                "bubble": one.bubble,
                "memory_gb": one.plan.partition.worst_memory.memory.total / GB,
                "step_seconds": one.step_seconds,
                "step_seconds_range": [
                    one.step_seconds * one.plan.spread.low,
                    one.step_seconds * one.plan.spread.high,
                ],
                "basis": one.plan.basis,
                "tokens_per_second": one.tokens_per_second,
                "mfu": one.plan.mfu_at(one.tokens_per_second),
            }
            for one in found.best
        ],
    }


def _why(best: Candidate, second: Candidate) -> str:
    """Comparison of the best layout with the second, the largest difference first."""

    def work(one: Candidate) -> float:
        return one.work_seconds

    def idle(one: Candidate) -> float:
        return one.pipeline_seconds - one.work_seconds - one.message_seconds

    def messages(one: Candidate) -> float:
        return one.message_seconds

    def closing(one: Candidate) -> float:
        return one.plan.closing_seconds

    parts = (
        ("the slowest stage's work", work),
        ("bubble", idle),
        ("messages between stages", messages),
        ("gradients and update", closing),
    )
    saved = sorted(
        ((of(second) - of(best), name, _pair(best, second, of)) for name, of in parts), reverse=True
    )
    words = "; ".join(
        f"{'saves' if gain >= 0 else 'costs'} {seconds(abs(gain))} of {name} ({pair})"
        for gain, name, pair in saved
        if abs(gain) > 1e-4 * best.step_seconds
    )
    gain = second.step_seconds / best.step_seconds - 1.0
    memory = [f"{one.plan.partition.worst_memory.memory.total / GB:.1f}" for one in (best, second)]
    return (
        f"1 is {gain:.2%} faster than 2{': it ' + words if words else ''}.\n"
        f"Memory per device: {memory[0]} GB with 1, {memory[1]} GB with 2."
    )


def _pair(best: Candidate, second: Candidate, of: Callable[[Candidate], float]) -> str:
    return f"{seconds(of(best))} against {seconds(of(second))}"


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def si(number: float) -> str:
    """A number to three digits with an SI prefix."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:
            return f"{digits(number / size)}{unit}"
    return f"{number:.3g}"


def digits(number: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def seconds(value: float) -> str:
    """A time to three digits, with its unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= 0.9995 * size:
            return f"{digits(value / size)} {unit}"
    return f"{value * 1e6:.3g} us"


def duration(value: float) -> str:
    """A duration in days, hours or smaller units."""
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return seconds(value)
