"""How many processes a run has that names no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.runtime import processes
from keel_megatron.runtime.processes import count_gpus, default_processes
from tests.settings import small_config


@pytest.mark.parametrize(
    ("cores", "settings", "expected"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (64, {}, 8),  # a batch of 16 in micro-batches of 2
        (7, {}, 4),  # 8 micro-batches cannot be divided by 5, 6 or 7
        (2, {"training__threads": 2}, 1),
        (2, {"parallel__pipeline": 4}, 4),  # one replica at any rate
        (9, {"parallel__pipeline": 2, "parallel__tensor": 2}, 8),
        (3, {"training__global_batch_size": 6}, 3),
        (8, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, 8),
        (
            8,
            {
                "parallel__pipeline": 4,
                "parallel__virtual_pipeline": 2,
                "training__global_batch_size": 8,
            },
            4,
        ),
    ],
)
def test_one_replica_or_as_many_as_there_are_cores_for(
    monkeypatch: pytest.MonkeyPatch, cores: int, settings: dict[str, int], expected: int
) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: cores)
    monkeypatch.setattr(processes, "count_gpus", lambda: 0)
    assert default_processes(small_config(**settings)) == expected


def test_gpus_go_before_cores_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "available_cores", lambda: 2)
    monkeypatch.setattr(processes, "count_gpus", lambda: 4)
    assert default_processes(small_config(training__device="auto")) == 4
    assert default_processes(small_config(training__device="cpu")) == 2
    monkeypatch.setattr(processes, "count_gpus", lambda: None)
    assert default_processes(small_config(training__device="auto")) == 1


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("2", 1),
        ("0,1", 2),
        ("0,-1,1", 1),
        ("0,1,2,3", 3),
        ("MIG-a,MIG-b", 2),
    ],
)
def test_gpus_are_the_driver_s_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, expected: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert count_gpus(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus(tmp_path) == expected


def test_under_windows_linux_the_number_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "dxg").touch()
    assert count_gpus(tmp_path) is None
