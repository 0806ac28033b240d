"""Pre-flight check of the nodes before training.

Versions, code and configuration are compared before process groups are created
(`runtime/rendezvous.agree`). This module checks devices, clocks, shared folders and bandwidth.
Failures are errors; slow connections are warnings.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from keel_megatron.cluster.bandwidth import (
    Link,
    Reduction,
    describe_links,
    probe_links,
    probe_reduction,
    rate_words,
    slow_links,
)
from keel_megatron.cluster.doctor import config_digest, device_memory
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime

DEADLINE_SECONDS = {"cpu": 30.0, "cuda": 120.0}
"""Time limit of the pre-flight, seconds; it includes NCCL's connection setup."""
CLOCK_SECONDS = 1.0
"""Tolerated clock difference, seconds."""
SHARED_SECONDS = 10.0
"""Time for a network file system to show other nodes' writes, seconds."""


@dataclass(frozen=True)
class Node:
    """Properties of a rank's node."""

    host: str
    local_rank: int
    memory: list[float]
    """Memory of each device, GB."""
    clock: float
    """Clock right after a barrier, seconds since 1970."""


def wanted(config: RunConfig, launch: Launch) -> bool:
    """Whether this run starts with a pre-flight."""
    several = launch.world_size > launch.local_world_size
    choice = config.parallel.preflight
    return choice == "always" or (choice == "auto" and several)


def check(config: RunConfig, runtime: Runtime) -> list[str]:
    """Check that the nodes can train together; collective over all ranks.

    Args:
        config: the run.
        runtime: this rank, with its process groups.

    Returns:
        The results and warnings as lines; the same on all ranks.

    Raises:
        UserError: a check failed; names the host. Raised on all ranks.
    """
    began = time.monotonic()
    with _Deadline(runtime).running() as deadline:
        deadline.note("all other ranks")
        runtime.barrier()
        nodes = _gather_nodes(runtime)
        _check_devices(nodes)
        for folder, setting in _folders(config):
            deadline.note(f"the folder {folder} on all other nodes")
            _check_shared(runtime, folder, setting)
        links, reductions = _probe(runtime, deadline)
        deadline.note("all other ranks' measurements")
        return runtime.from_main(
            lambda: _report(config, nodes, links, reductions, time.monotonic() - began)
        )


class _Deadline:
    """Ends this process with a message when the pre-flight takes too long.

    A broken connection blocks a rank in C code until the group's timeout; nothing else can end it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._who = runtime.named(runtime.rank)
        self._seconds = DEADLINE_SECONDS[runtime.device.type]
        self._waits_for = ""

    def note(self, what: str) -> None:
        """Set what this rank is waiting for."""
        self._waits_for = what

    @contextmanager
    def running(self) -> Iterator[_Deadline]:
        """Apply the time limit to the block."""
        timer = threading.Timer(self._seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield self
        finally:
            timer.cancel()

    def _expire(self) -> None:
        print(
            f"error: pre-flight: {self._who} waited {self._seconds:g} s "
            f"for {self._waits_for}; the network between them is broken or very slow "
            "(parallel.preflight: never skips this)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(exit_codes.FAILED)  # the network may work at the next start


def _gather_nodes(runtime: Runtime) -> list[Node]:
    """The nodes of all ranks, by rank, on all ranks."""
    launch = runtime.launch
    memory = device_memory()
    runtime.barrier()
    node = Node(runtime.host, launch.local_rank, memory, time.time())
    nodes: list[Node] = [node] * launch.world_size
    dist.all_gather_object(nodes, node)
    return nodes


def _check_devices(nodes: Sequence[Node]) -> None:
    """Refuse ranks of two launchers on one device; the same result on all ranks.

    Raises:
        UserError: several ranks use the same device.
    """
    places = [(node.host, node.local_rank) for node in nodes]
    for rank, place in enumerate(places):
        first = places.index(place)
        if first != rank:
            raise UserError(
                f"ranks {first} and {rank} are both process {place[1]} of a host {place[0]}: start "
                "one launcher per node, and give the nodes different host names",
                reported=dist.get_rank() != 0,
            )


def _folders(config: RunConfig) -> list[tuple[Path, str]]:
    """The folders that all nodes must share, with their settings."""
    found = {config.training.runs_dir.absolute(): "training.runs_dir"}
    found.setdefault(config.data.cache_dir.absolute(), "data.cache_dir")
    return list(found.items())


def _check_shared(runtime: Runtime, folder: Path, setting: str) -> None:
    """Check that all nodes share a folder; collective.

    Raises:
        UserError: the folder cannot be written, or differs between nodes.
    """
    is_leader = runtime.launch.local_rank == 0
    token = runtime.from_main(lambda: uuid.uuid4().hex)
    place = folder / f".preflight-{token}"
    try:
        problem = None
        if runtime.is_main:
            problem = _write(place / "main", token)
        runtime.barrier()
        if is_leader and not runtime.is_main:
            if not _appears(place / "main"):
                problem = "does not show what rank 0 wrote"
            else:
                problem = _write(place / f"rank_{runtime.rank}", token)
        gathered = runtime.gather((runtime.host, problem, is_leader and not runtime.is_main))
        runtime.from_main(lambda: _judge_folder(folder, setting, place, gathered))
    finally:
        if runtime.is_main:  # NFS may not show all entries yet; that is not an error
            shutil.rmtree(place, ignore_errors=True)


def _judge_folder(
    folder: Path, setting: str, place: Path, gathered: Sequence[tuple[str, str | None, bool]]
) -> None:
    main = gathered[0][0]
    for rank, (host, problem, writes) in enumerate(gathered):
        if problem is None and writes and not _appears(place / f"rank_{rank}"):
            problem = f"is not shared: host {main} does not see what host {host} wrote"
        if problem is not None:
            raise UserError(
                f"{setting}: {folder} on host {host} {problem}; it must be one folder that all "
                "nodes share and may write"
            )


def _write(path: Path, text: str) -> str | None:
    """Write a file; returns the problem, if there is one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        # Listing a folder refreshes the NFS cache.
        if path.parent.is_dir():
            list(path.parent.iterdir())
        time.sleep(0.05)
    return True


def _probe(runtime: Runtime, deadline: _Deadline) -> tuple[list[Link], list[Reduction]]:
    """Measure all groups of the layout; returns the results on rank 0."""
    from megatron.core import parallel_state

    interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
    links: list[Link] = []
    reductions: list[Reduction] = []
    groups = (
        ("tensor", parallel_state.get_tensor_model_parallel_group()),
        ("pipeline", parallel_state.get_pipeline_model_parallel_group()),
        ("data", parallel_state.get_data_parallel_group()),
    )
    for kind, group in groups:
        if dist.get_world_size(group) == 1:
            continue
        batched = kind != "pipeline" or not interleaved  # as Megatron-core's schedules send
        links += probe_links(kind, group, runtime, deadline.note, batched=batched)
        if kind != "pipeline":  # which never reduces
            deadline.note(f"the {kind} group's all-reduce")
            reductions.append(probe_reduction(kind, group, runtime.device))
    deadline.note("all other ranks' measurements")
    gathered = runtime.gather((links, reductions))
    return [x for some, _ in gathered for x in some], [x for _, some in gathered for x in some]


def _report(
    config: RunConfig,
    nodes: Sequence[Node],
    links: Sequence[Link],
    reductions: Sequence[Reduction],
    seconds: float,
) -> list[str]:
    """The results as lines, warnings last."""
    skew = {node.host: node.clock - nodes[0].clock for node in nodes}
    worst = max(abs(value) for value in skew.values())
    memory = sorted({round(gb, 1) for node in nodes for gb in node.memory})
    lines = [
        f"pre-flight of {len(skew)} node(s), {len(nodes)} rank(s), {seconds:.1f} s: versions, code "
        f"and configuration {config_digest(config)} equal; folders shared; clocks within "
        f"{worst:.2g} s; {' to '.join(str(gb) for gb in {memory[0]: 0, memory[-1]: 0})} GB a device"
    ]
    lines += [f"  {line}" for line in describe_links(links)]
    for kind in dict.fromkeys(reduction.kind for reduction in reductions):
        like = [reduction for reduction in reductions if reduction.kind == kind]
        slowest = min(like, key=lambda reduction: reduction.rate)
        lines.append(
            f"  {kind}, all-reduce over {slowest.size}: {1e3 * slowest.latency:.3g} ms, "
            f"{rate_words(slowest.rate)} (bus, the slowest of {len(like)})"
        )
    warnings = [f"slow link {text}" for text in slow_links(links)]
    warnings += [
        f"the clock of host {host} is {abs(value):.3g} s {'ahead of' if value > 0 else 'behind'} "
        f"that of host {nodes[0].host}: time limits and log times will differ"
        for host, value in skew.items()
        if abs(value) > CLOCK_SECONDS
    ]
    warnings += _unequal_devices(nodes)
    return lines + [f"warning: {text}" for text in warnings]


def _unequal_devices(nodes: Sequence[Node]) -> list[str]:
    """Hosts with fewer or smaller devices than the best one."""
    kinds = {node.host: (len(node.memory), round(min(node.memory))) for node in nodes}
    best = max(kinds.values())
    return [
        f"host {host} has {count} device(s) of {gb} GB, others {best[0]} of {best[1]} GB"
        for host, (count, gb) in kinds.items()
        if (count, gb) < best
    ]
