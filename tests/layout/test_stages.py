"""The one decision: what it gives, what it refuses, how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.errors import UserError
from keel_megatron.layout.chunks import from_counts
from keel_megatron.layout.devices import DEVICES, device_named, this_device
from keel_megatron.layout.memory import GB
from keel_megatron.layout.stage_table import KINDS, stage_rows, stage_table, summary, write_stages
from keel_megatron.layout.stages import Partition, memory_limit, partition, require_fit
from tests.settings import small_config
from tests.training.matrix import AUTO_RECOMPUTE

PAPER: dict[str, Any] = {
    "model__blocks": 512,
    "model__hidden_size": 1024,
    "model__ffn_hidden_size": 3072,
    "model__num_attention_heads": 16,
    "model__num_query_groups": 8,
    "data__seq_length": 4096,
    "data__vocab_size": 131072,
    "training__precision": "bf16",
    "training__micro_batch_size": 1,
    "training__global_batch_size": 1024,
}
H200 = DEVICES["h200"]


def paper(data_parallel: int = 8, **overrides: Any) -> Partition:
    return partition(small_config(**{**PAPER, **overrides}), data_parallel, H200)


def counts(found: Partition) -> list[int]:
    return [chunk.blocks for chunk in found.layout.chunks]


def test_a_large_vocabulary_takes_blocks_off_the_last_stage() -> None:
    """At hidden 1024 and vocabulary 128k the head costs about five blocks of the device's time.

    Less of the longer time of a stage of blocks alone, which is the host's.
    """
    found = paper(parallel__pipeline=32)
    head = found.times.head.total / found.times.block.total
    assert 4.5 < head < 6
    assert head - 1.5 < counts(found)[-2] - counts(found)[-1] < head + 1
    config = small_config(**PAPER, parallel__pipeline=32)
    even = partition(config, 8, H200, layout=from_counts([16] * 32, 32))
    assert even.slowest.number == 31
    assert even.balance > 1.3 > 1.06 > found.balance
    assert found.slowest.seconds == min(even.slowest.seconds, found.slowest.seconds)


def test_the_table_holds_every_parameter() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"model__first_block": "v1"},
        {"parallel__virtual_pipeline": 2},
    ]
    for overrides in cases:
        found = paper(parallel__pipeline=8, **overrides)
        config = small_config(**{**PAPER, **overrides})
        total = parameter_count(config.model, 131072)
        assert sum(row["parameters"] for row in stage_rows(found)) == total


def test_recompute_auto_fits_with_less_recomputation_than_full() -> None:
    settings = {"parallel__pipeline": 4, "parallel__memory_gb": 50.0}
    assert not paper(**settings).fits
    full = paper(**settings, parallel__recompute="full")
    auto = paper(**settings, parallel__recompute="auto")
    assert full.fits
    assert auto.fits
    assert auto.slowest.seconds < full.slowest.seconds
    again = [sum(stage.recomputed) for stage in auto.stages]
    assert again == sorted(again, reverse=True)
    assert again[0] > again[-1]
    assert all(stage.memory.total <= 50 * GB for stage in auto.stages)


def test_the_parity_run_with_auto_recompute_recomputes_some_blocks() -> None:
    found = partition(small_config(**AUTO_RECOMPUTE), 1, DEVICES["cpu"])
    again = [sum(stage.recomputed) for stage in found.stages]
    assert found.fits
    assert 0 < sum(again) < 8


def test_memory_limits() -> None:
    assert memory_limit(small_config(), DEVICES["cpu"]) is None
    assert memory_limit(small_config(), H200) == pytest.approx((150.1 - 4) * GB)
    assert memory_limit(small_config(parallel__memory_gb=2.5), H200) == 2.5 * GB


def test_what_cannot_fit_is_refused_where_a_limit_is_set() -> None:
    config = small_config(**PAPER, parallel__pipeline=2, parallel__memory_gb=40.0)
    found = partition(config, 1, H200)
    with pytest.raises(UserError, match=r"parallel.memory_gb: stage 0 needs .* GB, 40 are"):
        require_fit(found, config)
    assert "EXCEEDS THE LIMIT" in summary(found)
    small = small_config(parallel__memory_gb=40.0)
    require_fit(partition(small, 1, H200), small)


def test_a_users_own_layout_is_taken_as_it_is() -> None:
    config = small_config(
        parallel__pipeline=2, parallel__virtual_pipeline=2, parallel__layout=[0, 5, 1, 2]
    )
    found = partition(config, 1, H200)
    assert [tuple(chunk.blocks for chunk in stage.chunks) for stage in found.stages] == [
        (0, 1),
        (5, 2),
    ]
    assert [stage.embedding for stage in found.stages] == [True, False]
    assert [stage.head for stage in found.stages] == [False, True]


def test_the_decision_is_repeatable() -> None:
    a, b = (paper(parallel__pipeline=8, parallel__virtual_pipeline=4) for _ in range(2))
    assert (a.layout, a.stages) == (b.layout, b.stages)


def test_the_text_table_joins_equal_stages() -> None:
    found = paper(parallel__pipeline=64)
    lines = stage_table(found)
    assert len(lines) < 10
    assert " ".join(lines[0].split()) == "stage blocks recomputed with parameters memory GB time"
    first, last = (str(found.stages[stage].blocks) for stage in (0, -1))
    assert lines[1].split()[:4] == ["0", first, "0", "embedding"]
    assert lines[-1].split()[:4] == ["63", last, "0", "head"]
    assert "64 chunk(s) hold 512 blocks" in summary(found)
    assert len(set(map(len, lines[1:]))) == 1


def test_a_short_table_has_a_line_a_stage_and_its_memory_by_kind() -> None:
    found = paper(parallel__pipeline=8)
    lines = stage_table(found, memory_by_kind=True)
    assert len(lines) == 1 + 8
    columns = lines[0].replace("memory GB", "memory").split()
    for line, stage in zip(lines[1:], found.stages, strict=True):
        shown = dict(zip(columns, line.replace(" %", "%").split(), strict=True))
        assert (shown["stage"], shown["blocks"]) == (str(stage.number), str(stage.blocks))
        kinds = [float(shown[kind]) for kind in KINDS]
        assert sum(kinds) == pytest.approx(float(shown["memory"]), rel=0.02)
        assert float(shown["memory"]) == pytest.approx(stage.memory.total / GB, rel=0.01)


def test_the_saved_table_is_read_back(tmp_path: Path) -> None:
    found = paper(parallel__pipeline=8)
    write_stages(found, tmp_path / "stages.json")
    rows = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert sum(row["blocks"] for row in rows) == 512
    assert max(row["time_share"] for row in rows) == 1.0
    for row in rows:
        assert sum(row["memory_gb_by_kind"].values()) == pytest.approx(row["memory_gb"])


def test_a_device_can_be_described_otherwise() -> None:
    assert device_named("h200", memory_gb=100.0).memory_gb == 100.0
    with pytest.raises(UserError, match="must be one of h200, h100, a100, b200, cpu"):
        device_named("h300")
    with pytest.raises(UserError, match="a device has no property memory"):
        device_named("h200", memory=1.0)


def test_a_gpu_is_known_by_its_name_and_has_its_own_memory(monkeypatch: Any) -> None:
    for title, name in (("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("X", "h100")):
        properties = SimpleNamespace(name=title, total_memory=75 * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device, p=properties: p)
        found = this_device(torch.device("cuda", 0))
        assert (found.name, found.memory_gb) == (name, 75.0)
    assert this_device(torch.device("cpu")) is DEVICES["cpu"]


# What torch has reported of devices on different drivers, GiB.
@pytest.mark.parametrize(
    ("title", "name", "gib"),
    [
        ("NVIDIA H200", "h200", (139.72, 139.80, 139.81)),
        ("NVIDIA H100 80GB HBM3", "h100", (79.10, 79.18, 79.25)),
        ("NVIDIA A100-SXM4-80GB", "a100", (79.14, 79.15, 79.25)),
        ("NVIDIA B200", "b200", (178.35, 178.36)),
    ],
)
def test_a_run_and_a_plan_see_the_same_memory(
    monkeypatch: Any, title: str, name: str, gib: tuple[float, ...]
) -> None:
    """On every node, whatever its driver keeps for itself."""
    for size in gib:
        properties = SimpleNamespace(name=title, total_memory=int(size * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device, p=properties: p)
        assert this_device(torch.device("cuda", 0)) == device_named(name)
