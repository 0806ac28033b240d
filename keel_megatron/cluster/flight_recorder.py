"""NCCL's flight recorder: the messages that a rank has started and not finished.

torch keeps the latest 2,000 of every process (`TORCH_FR_BUFFER_SIZE`). On CUDA the main thread does
not say whether a rank waits for others: it is usually far ahead of its device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch._C._distributed_c10d as c10d


@dataclass(frozen=True)
class Messages:
    """What a rank's flight recorder says."""

    waits: bool
    """Whether a message is unfinished."""
    pending: str | None = None
    """The latest operation of a group with an unfinished message."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of collectives started by group; only groups to which the rank belongs."""


def dump() -> str | None:
    """The flight recorder's contents as JSON; None where torch has no NCCL."""
    make: Any = getattr(c10d, "_dump_nccl_trace_json", None)
    if make is None:
        return None
    found: bytes | str = make(includeCollectives=True, onlyActive=False)
    return found.decode() if isinstance(found, bytes) else found


def read(text: str) -> Messages:
    """Interpret a dump.

    A message's own state is no help: the parts of a batch of sends and receives have none. So a
    group is unfinished if the latest message that it started is not the latest that ended.
    """
    found = json.loads(text)
    status = {
        int(group): values["last_enqueued_collective"] != values["last_completed_collective"]
        for group, values in found.get("pg_status", {}).items()
    }
    counts: dict[str, int] = {}
    pending = None
    for entry in sorted(found.get("entries", []), key=lambda entry: entry["record_id"]):
        name, description = entry["process_group"]
        number = entry["collective_seq_id"]
        if not entry["is_p2p"]:
            counts[name] = max(counts.get(name, 0), number)
        if status.get(entry["pg_id"]):
            what = entry["profiling_name"].removeprefix("nccl:")
            pending = f"{what} ({description or 'default'})"
    return Messages(any(status.values()), pending, counts)
