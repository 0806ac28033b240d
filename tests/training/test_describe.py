"""What is told of a run before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.stages import partition
from keel_megatron.runtime import machines
from keel_megatron.training import describe
from keel_megatron.training.describe import describe_run, version_changes
from tests.settings import small_config
from tests.training.fakes import Alone, FakeTracker


class Split(Alone):
    """Rank 0 of two pipeline stages."""

    tensor_size, pipeline_size, data_size = 1, 2, 1


def described(folder: Path, runtime: Alone, *, resumes: bool = False) -> FakeTracker:
    config = small_config(parallel__pipeline=2, parallel__virtual_pipeline=2)
    tracker: Any = FakeTracker(folder)
    stages: Any = partition(config, 1, DEVICES["cpu"])
    describe_run(tracker, runtime, stages, resumes=resumes)  # type: ignore[arg-type]
    return tracker


def test_the_place_is_tagged_and_the_runs_files_are_handed_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    tracker = described(tmp_path, Split())
    assert tracker.tagged["layout"] == "TP 1 x PP 2 x VPP 2 x DP 1"
    assert tracker.tagged["device"].endswith(" CPU")
    assert [path.name for path in tracker.artifacts] == ["config.yaml", "stages.json"]
    assert tracker.said == []


def test_the_machines_are_recorded_those_of_earlier_starts_too(tmp_path: Path) -> None:
    earlier = machines.Machine("abacus", 1)
    machines.record(tmp_path, [earlier])
    described(tmp_path, Split(), resumes=True)
    assert machines.recorded(tmp_path) == [earlier, machines.this_machine()]
    described(tmp_path, Split())
    assert machines.recorded(tmp_path) == [machines.this_machine()]


def test_only_rank_0_describes(tmp_path: Path) -> None:
    class Other(Split):
        is_main = False

    tracker = described(tmp_path, Other())
    assert (tracker.tagged, list(tmp_path.iterdir())) == ({}, [])


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(describe, "write_stages", fail)
    tracker = described(tmp_path, Split())
    assert tracker.said == [f"cannot write {tmp_path}/stages.json: No space left on device"]


def test_other_versions_are_named_and_the_same_are_not() -> None:
    saved = {"torch": "2.12", "numpy": "2.0", "triton": "3.4"}
    current = {"torch": "2.13", "numpy": "2.0", "deepspeed": "0.19"}
    assert version_changes(saved, current) == [
        "deepspeed was absent when the checkpoint was written, now 0.19: the last bits may differ",
        "torch was 2.12 when the checkpoint was written, now 2.13: the last bits may differ",
        "triton was 3.4 when the checkpoint was written, now absent: the last bits may differ",
    ]
    assert version_changes(current, current) == []
