"""Available CPU cores, from affinity and cgroup quota. Does not import torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


def available_cores(proc: Path = _PROC) -> int:
    """Number of available cores, at least 1.

    The smaller of the CPU affinity (taskset, SLURM binding) and the CPU quota of its cgroup and its
    parents (container limits, cgroup v1 or v2), rounded up to whole cores.

    Args:
        proc: this process's folder in /proc; tests make one.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(proc))]))


def _quotas(proc: Path) -> Iterator[float]:
    """Every limit that applies, in cores."""
    for folder, top in _cgroups(proc):
        while True:
            quota = _quota(folder)
            if quota is not None:
                yield quota
            if folder == top:
                break
            folder = folder.parent


def _cgroups(proc: Path) -> Iterator[tuple[Path, Path]]:
    """This process's folder in each cgroup hierarchy that limits CPU time, with its root."""
    own = _own_paths(proc)
    for line in _lines(proc / "mountinfo"):
        left, _separator, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) < 5 or len(after) < 3:
            continue
        is_v1 = after[0] == "cgroup" and "cpu" in after[2].split(",")
        if not is_v1 and after[0] != "cgroup2":
            continue
        path = own.get("cpu" if is_v1 else "")
        if path is not None:
            top = Path(_unescaped(before[4]))
            yield top / _below(path, _unescaped(before[3])), top


def _own_paths(proc: Path) -> dict[str, str]:
    """This process's cgroup by controller; that of cgroup v2 under the empty name."""
    found = {}
    for line in _lines(proc / "cgroup"):
        _number, _colon, rest = line.partition(":")
        controllers, _colon, path = rest.partition(":")
        for name in controllers.split(","):
            found[name] = path
    return found


def _below(path: str, mounted: str) -> PurePosixPath:
    """A cgroup's path below its mount; the mount itself where the path leads out of it.

    A container without a cgroup namespace has its own cgroup mounted as the top.
    """
    try:
        below = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in below.parts else below


def _quota(folder: Path) -> float | None:
    """A cgroup's own limit in cores; None: no limit."""
    v2 = " ".join(_lines(folder / "cpu.max")).split()
    v1 = [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
    for values in (v2, v1):
        try:
            quota, period = (int(value) for value in values)
        except ValueError:  # "max", or no such file
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def _unescaped(text: str) -> str:
    """A path of mountinfo, in which white space and backslashes are written in octal."""
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        text = text.replace(f"\\{code}", character)
    return text


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
