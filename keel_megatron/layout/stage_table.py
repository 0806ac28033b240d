"""The stage table, as text and as JSON rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keel_megatron.layout.memory import GB, StageMemory
from keel_megatron.layout.stages import Partition, Stage
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.tables import table_lines

COLUMNS = ("stage", "blocks", "recomputed", "with", "parameters", "memory GB", "time")
KINDS = ("weights", "grads", "optim", "activations", "logits", "buffers")
"""Columns of the memory by kind, in GB."""
_JOINED_FROM = 9
"""Stages from which on a table joins equal ones."""
_CHUNKS_SHOWN = 4


def stage_rows(partition: Partition) -> list[dict[str, Any]]:
    """One object per stage: blocks, parameters per device, memory by kind in GB, time.

    `time_share` is relative to the slowest stage; `forward_seconds` and `backward_seconds` are
    predicted for one micro-batch, as are `device_seconds` and `host_seconds`, both passes together;
    the longer one counts.
    """
    return [
        {
            "stage": stage.number,
            "blocks": stage.blocks,
            "chunks": [
                {"first_block": chunk.first_block, "blocks": chunk.blocks} for chunk in stage.chunks
            ],
            "recomputed": sum(stage.recomputed),
            "recomputed_lightly": sum(stage.light),
            "embedding": stage.embedding,
            "head": stage.head,
            "parameters": stage.parameters,
            "memory_gb": stage.memory.total / GB,
            "memory_gb_by_kind": {kind: size / GB for kind, size in asdict(stage.memory).items()},
            "time_share": partition.time_share(stage),
            "forward_seconds": stage.forward_seconds,
            "backward_seconds": stage.backward_seconds,
            "device_seconds": stage.times.device.total,
            "host_seconds": stage.times.host.total,
        }
        for stage in partition.stages
    ]


def write_stages(partition: Partition, path: Path) -> None:
    """Write the rows to a JSON file.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, json.dumps({"stages": stage_rows(partition)}, indent=1) + "\n")


def stage_table(partition: Partition, *, memory_by_kind: bool = False) -> list[str]:
    """The lines of the table, a line per stage.

    From 9 stages on, adjacent ones that differ only in memory share a line, which shows the largest
    memory. `+` joins the chunks of a stage.

    Args:
        partition: the stages.
        memory_by_kind: show what the memory is used for, too.
    """
    groups = [[stage] for stage in partition.stages]
    if len(groups) >= _JOINED_FROM:
        same = itertools.groupby(partition.stages, key=lambda stage: _cells(partition, stage))
        groups = [list(group) for _, group in same]
    rows = []
    for group in groups:
        first, last = group[0].number, group[-1].number
        memory = max((stage.memory for stage in group), key=lambda one: one.total)
        *cells, time = _cells(partition, group[0])
        sizes = [*_kinds(memory), memory.total] if memory_by_kind else [memory.total]
        numbers = f"{first}" if first == last else f"{first}-{last}"
        rows.append((numbers, *cells, *(f"{size / GB:.3g}" for size in sizes), time))
    *columns, time = COLUMNS
    *columns, total = columns
    shown = [*columns, *(KINDS if memory_by_kind else ()), total, time]
    return table_lines(shown, rows)


def _kinds(memory: StageMemory) -> list[float]:
    """Bytes by kind, in the order of `KINDS`."""
    state = [memory.parameters, memory.gradients, memory.optimizer]
    buffers = memory.inputs + memory.communication + memory.working
    return [*state, memory.activations, memory.logits, buffers]


def _cells(partition: Partition, stage: Stage) -> tuple[str, str, str, str, str]:
    """The cells of a stage, except its number and memory."""
    chunks = [str(chunk.blocks) for chunk in stage.chunks]
    pieces = ["embedding"] * stage.embedding + ["head"] * stage.head
    return (
        "+".join(chunks) if len(chunks) <= _CHUNKS_SHOWN else f"{stage.blocks} in {len(chunks)}",
        _recomputed(stage),
        " ".join(pieces) or "-",
        f"{stage.parameters:,}",
        f"{100 * partition.time_share(stage):.0f} %",
    )


def _recomputed(stage: Stage) -> str:
    full, light = sum(stage.recomputed), sum(stage.light)
    return " + ".join([str(full)] * (full > 0) + [f"{light} light"] * (light > 0)) or "0"


def summary(partition: Partition) -> str:
    """Balance and memory of all stages in one line."""
    worst = partition.worst_memory
    limit = partition.limit_bytes
    return (
        f"{len(partition.layout.chunks)} chunk(s) hold "
        f"{sum(stage.blocks for stage in partition.stages)} blocks; slowest stage "
        f"{partition.slowest.number}, {100 * (partition.balance - 1):.1f} % above perfect balance; "
        f"most memory at stage {worst.number}, {worst.memory.total / GB:.3g} GB"
        + ("" if limit is None else f" of {limit / GB:.3g} GB")
        + ("" if partition.fits else ": EXCEEDS THE LIMIT")
    )
