"""What a flight recorder's dump comes to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from keel_megatron.cluster import flight_recorder
from tests.distributed import run_ranks


def entry(number: int, group: int, name: str, collective: int, **values: Any) -> dict[str, Any]:
    return {
        "record_id": number,
        "pg_id": group,
        "process_group": [f"group {group}", ["default_pg", "DATA_PARALLEL_GROUP"][group]],
        "profiling_name": f"nccl:{name}",
        "collective_seq_id": collective,
        "is_p2p": False,
        "state": "scheduled",
        **values,
    }


def status(enqueued: int, completed: int) -> dict[str, str]:
    return {
        "last_enqueued_collective": str(enqueued),
        "last_started_collective": "-1",
        "last_completed_collective": str(completed),
    }


ENTRIES = [
    entry(0, 0, "broadcast", 1),
    entry(1, 1, "reduce_scatter", 1),
    entry(2, 0, "send 0->1", 1, is_p2p=True),
    entry(3, 1, "all_reduce", 2),
]
HUNG = json.dumps({"entries": ENTRIES, "pg_status": {"0": status(1, 1), "1": status(2, 1)}})
DONE = json.dumps({"entries": ENTRIES, "pg_status": {"0": status(1, 1), "1": status(2, 2)}})


def test_an_unfinished_message_is_named() -> None:
    found = flight_recorder.read(HUNG)
    assert found.waits
    assert found.pending == "all_reduce (DATA_PARALLEL_GROUP)"
    assert found.counts == {"group 0": 1, "group 1": 2}
    done = flight_recorder.read(DONE)
    assert (done.waits, done.pending, done.counts) == (False, None, found.counts)


def test_a_torch_without_nccl_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(c10d, "_dump_nccl_trace_json", raising=False)
    assert flight_recorder.dump() is None
    monkeypatch.setattr(
        c10d,
        "_dump_nccl_trace_json",
        lambda *, includeCollectives, onlyActive: HUNG.encode(),
        raising=False,
    )
    assert flight_recorder.dump() == HUNG


def recorded() -> str:
    """gloo's recorder, which has NCCL's format."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(2))
    dist.barrier()
    text: bytes = c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False)
    dist.destroy_process_group()
    return text.decode()


@pytest.mark.skipif(not hasattr(c10d, "_dump_fr_trace_json"), reason="an older torch")
def test_the_format_is_torchs() -> None:
    (text,) = run_ranks(1, recorded)
    found = flight_recorder.read(text)
    assert list(found.counts.values()) == [2]
    assert not found.waits
