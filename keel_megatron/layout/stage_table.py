"""The stage table, as text and as JSON rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keel_megatron.layout.memory import GB
from keel_megatron.layout.stages import Partition, Stage
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.tables import table_lines

COLUMNS = ("stage", "blocks", "recomputed", "with", "parameters", "memory GB", "time")


def stage_rows(partition: Partition) -> list[dict[str, Any]]:
    """One object per stage: blocks, parameters per device, memory by kind in GB, time.

    `time_share` is relative to the slowest stage; `forward_seconds` and `backward_seconds` are
    predicted for one micro-batch.
    """
    return [
        {
            "stage": stage.number,
            "blocks": stage.blocks,
            "chunks": [
                {"first_block": chunk.first_block, "blocks": chunk.blocks} for chunk in stage.chunks
            ],
            "recomputed": sum(stage.recomputed),
            "embedding": stage.embedding,
            "head": stage.head,
            "parameters": stage.parameters,
            "memory_gb": stage.memory.total / GB,
            "memory_gb_by_kind": {k: v / GB for k, v in asdict(stage.memory).items()},
            "time_share": partition.time_share(stage),
            "forward_seconds": stage.forward_seconds,
            "backward_seconds": stage.backward_seconds,
        }
        for stage in partition.stages
    ]


def write_stages(partition: Partition, path: Path) -> None:
    """Write the rows to a JSON file.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, json.dumps({"stages": stage_rows(partition)}, indent=1) + "\n")


def stage_table(partition: Partition) -> list[str]:
    """The lines of the table; adjacent stages that differ only in memory share a line.

    Such a line shows the largest memory of its stages. `+` joins the chunks of a stage.
    """
    rows: list[tuple[str, ...]] = []
    for _, group in itertools.groupby(partition.stages, key=lambda stage: _cells(partition, stage)):
        stages = list(group)
        first, last = stages[0].number, stages[-1].number
        numbers = f"{first}" if first == last else f"{first}-{last}"
        memory = max(stage.memory.total for stage in stages) / GB
        blocks, recomputed, pieces, parameters, time = _cells(partition, stages[0])
        rows.append((numbers, blocks, recomputed, pieces, parameters, f"{memory:.3g}", time))
    return [*table_lines(COLUMNS, rows), _summary(partition)]


def _cells(partition: Partition, stage: Stage) -> tuple[str, str, str, str, str]:
    """The cells of a stage, except its number and memory."""
    pieces = ["embedding"] * stage.embedding + ["head"] * stage.head
    return (
        "+".join(str(chunk.blocks) for chunk in stage.chunks),
        str(sum(stage.recomputed)),
        " ".join(pieces) or "-",
        f"{stage.parameters:,}",
        f"{100 * partition.time_share(stage):.0f} %",
    )


def _summary(partition: Partition) -> str:
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
