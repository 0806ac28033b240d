"""A trace in words and tables, beside the plan's own figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from keel_megatron.layout.memory import GB
from keel_megatron.planner.report import digits, si
from keel_megatron.planner.trace.result import RankTrace
from keel_megatron.planner.trace.run import LIMITS, Trace
from keel_megatron.runtime.tables import table_lines

_PARTS = ("step", "depth profile", "validation", "save")
_MEMORY = ("stage", "plan", *_PARTS, "plan is", "reserved", "expandable", "fullest in")
_WORK = ("stage", "TFLOP", "launches", "waits", "messages (number, bytes)", "waits in")


def describe_trace(trace: Trace) -> str:
    """Both tables of a trace and its limits, for a terminal."""
    worst = trace.worst
    part = worst.parts[worst.worst]
    first = trace.ranks[0]
    some = first.micro_batches < first.all_micro_batches
    lines = [
        "",
        f"Traced: one rank of {len(trace.ranks)} distinct stage(s), {first.micro_batches} of "
        f"{first.all_micro_batches} micro-batches, {max(r.seconds for r in trace.ranks):.0f} s. "
        "Memory in GB:",
        *_indented(_MEMORY, [_memory(trace, rank) for rank in trace.ranks], len(_MEMORY) - 1),
        f"Fullest: stage {worst.stage} in its {worst.worst}, at {part.peak_operator} called by "
        f"{part.peak_where}.",
        "",
        "A step" + (", scaled to all its micro-batches:" if some else ":"),
        *_indented(_WORK, [_work(trace, rank) for rank in trace.ranks], 4, 5),
        LIMITS,
    ]
    return "\n".join(lines)


def _indented(columns: Sequence[str], rows: list[list[str]], *left: int) -> list[str]:
    return ["  " + line for line in table_lines(columns, rows, left=left)]


def _memory(trace: Trace, rank: RankTrace) -> list[str]:
    parts = [f"{rank.parts[name].peak / GB:.3f}" if name in rank.parts else "-" for name in _PARTS]
    return [
        _stages(trace, rank),
        f"{rank.planned / GB:.3f}",
        *parts,
        f"{rank.deviation:+.1%}",
        f"{rank.reserved / GB:.3f}",
        f"{rank.reserved_expandable / GB:.3f}",
        f"{rank.worst}: {rank.parts[rank.worst].peak_operator}",
    ]


def _work(trace: Trace, rank: RankTrace) -> list[str]:
    waits = rank.parts["step"].waits
    return [
        _stages(trace, rank),
        digits(rank.flops / 1e12),
        f"{rank.launches:,.0f}",
        str(sum(waits.values())),
        messages(rank),
        "; ".join(name.partition(" in ")[2] for name in waits),
    ]


def messages(rank: RankTrace) -> str:
    """The step's messages by group: how many, and their bytes."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for _operation, group, number, size in rank.messages():
        groups[group] += Counter({"number": round(number), "bytes": round(size)})
    return (
        ", ".join(
            f"{name} {found['number']:,} x {si(found['bytes'] / max(found['number'], 1))}B"
            for name, found in sorted(groups.items())
        )
        or "-"
    )


def _stages(trace: Trace, rank: RankTrace) -> str:
    """The stages that are like the traced one."""
    like = [number for number, first in enumerate(trace.like) if first == rank.stage]
    return str(like[0]) if len(like) == 1 else f"{like[0]}-{like[-1]}"
