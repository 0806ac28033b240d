"""A container's CPU quota counts as much as the process's affinity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from keel_megatron.runtime import device
from keel_megatron.runtime.cores import available_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


def machine(folder: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder as /proc/self, with the cgroup files that it leads to."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


def v2(folder: Path, root: str = "/") -> str:
    return (
        "22 1 0:20 / /proc rw - proc proc rw\n"
        f"30 23 0:26 {root} {folder}/fs rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    )


def v1(folder: Path, root: str) -> str:
    return (
        f"31 23 0:27 {root} {folder}/memory rw - cgroup cgroup rw,memory\n"
        f"32 23 0:28 {root} {folder}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    )


@pytest.mark.parametrize(
    ("path", "files", "cores"),
    [
        ("/", {"fs/cpu.max": "100000 100000\n"}, 1),
        ("/job/pod", {"fs/job/pod/cpu.max": "250000 100000\n"}, 3),  # 2.5 cores
        ("/job/pod", {"fs/job/cpu.max": "200000 100000\n", "fs/job/pod/cpu.max": "max 100000"}, 2),
        ("/job/pod", {"fs/job/cpu.max": "50000 100000\n"}, 1),
        ("/job/pod", {"fs/job/cpu.max": "max 100000\n"}, 8),
        ("/job/pod", {"fs/job/cpu.max": "9900000 100000\n"}, 8),  # more than the machine has
        ("/../../x", {"fs/cpu.max": "400000 100000\n"}, 4),  # outside of the namespace
        ("/job/pod", {}, 8),
        ("/", {"fs/cpu.max": "nonsense\n"}, 8),
    ],
)
def test_cgroup_v2(tmp_path: Path, path: str, files: dict[str, str], cores: int) -> None:
    assert available_cores(machine(tmp_path, f"0::{path}\n", v2(tmp_path), files)) == cores


@pytest.mark.parametrize(
    ("root", "folder"), [("/", "cpu,cpuacct/docker/1"), ("/docker/1", "cpu,cpuacct")]
)
@pytest.mark.parametrize(("quota", "cores"), [("150000", 2), ("-1", 8)])
def test_cgroup_v1(tmp_path: Path, root: str, folder: str, quota: str, cores: int) -> None:
    """Seen from the host, or in a container that has its own cgroup mounted as the top."""
    cgroup = "3:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000\n"}
    assert available_cores(machine(tmp_path, cgroup, v1(tmp_path, root), files)) == cores


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 8


def test_threads_share_the_available_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_cores", lambda: 5)
    set_to: list[int] = []
    monkeypatch.setattr(device.torch, "set_num_threads", set_to.append)
    assert [device.set_threads(0, ranks) for ranks in (1, 2, 8)] == [5, 2, 1]
    assert device.set_threads(7, 2) == 7
    assert set_to == [5, 2, 1, 7]
