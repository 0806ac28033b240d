"""The record of the machines that trained a run, and their names in results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keel_megatron.runtime.machines import (
    FILE,
    Machine,
    Place,
    machines,
    named,
    record,
    recorded,
    this_machine,
)

CPU = Machine("AMD EPYC", 2)
GPUS = Machine("AMD EPYC", 96, 2, "NVIDIA H200", 16)


def test_nodes_of_a_kind_are_one_entry() -> None:
    ranks = [Place(f"node{n // 8}", "AMD EPYC", 96, "NVIDIA H200") for n in range(16)]
    assert machines(ranks) == [GPUS]
    other = [Place("far", "Xeon", 8, None)] * 2
    assert machines([*ranks, *other]) == [GPUS, Machine("Xeon", 8)]


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        (CPU, "AMD EPYC, 2 cores"),
        (Machine("Xeon", 1, 3), "3 nodes with Xeon, 1 core"),
        (GPUS, "16 x NVIDIA H200 on 2 nodes (AMD EPYC, 96 cores)"),
        (Machine("Xeon", 8, 1, "NVIDIA L4", 1), "1 x NVIDIA L4 (Xeon, 8 cores)"),
    ],
)
def test_names(machine: Machine, text: str) -> None:
    assert str(machine) == text


def test_each_kind_of_a_runs_starts_is_recorded_once(tmp_path: Path) -> None:
    assert recorded(tmp_path) == [None]
    record(tmp_path, [CPU], recorded(tmp_path))  # its first start was before there was a record
    record(tmp_path, [GPUS], recorded(tmp_path))
    record(tmp_path, [CPU], recorded(tmp_path))
    assert recorded(tmp_path) == [None, CPU, GPUS]
    assert named(recorded(tmp_path)).startswith("not recorded and AMD EPYC, 2 cores and 16 x")
    record(tmp_path, [CPU])  # begun anew
    assert recorded(tmp_path) == [CPU]
    assert this_machine().cores >= 1


@pytest.mark.parametrize(
    "content",
    ["[", "{}", "[]", "[7]", '[{"cpu": 1, "cores": 2}]', '[{"cpu": "a"}]', '[{"gpus": "rm"}]'],
)
def test_a_record_that_is_none_is_not_recorded(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert recorded(tmp_path) == [None]


def test_a_strangers_record_controls_no_terminal(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps([{"cpu": "\x1b[2J\n", "cores": 1, "gpu": "\x07"}]))
    assert named(recorded(tmp_path)).isprintable()
