"""Bandwidth probe: latency and bandwidth between ranks of a layout, and slow connections.

The probe treats every group of the layout as a ring of ranks. Neighbours exchange messages, all
disjoint pairs at the same time, as in training. So ranks share a host's network card as in
training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, median_high
from typing import Any

import torch
import torch.distributed as dist

from keel_megatron.runtime.distributed import Runtime

_ROUNDS = 8
_SMALLEST, _GROWTH = 1 << 16, 4
_LARGEST = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Initial message size, bytes; it grows until a message takes `_LONG_ENOUGH`."""
_LONG_ENOUGH = 0.03
Message = Callable[[Callable[..., Any], torch.Tensor, int], None]
_SLOW_RATE, _SLOW_LATENCY, _LEAST_LATENCY = 1 / 4, 10.0, 5e-3


@dataclass(frozen=True)
class Link:
    """The connection of two neighbours in a group of the layout."""

    kind: str
    """pipeline, data or tensor."""
    hosts: tuple[str, str]
    ranks: tuple[int, int]
    latency: float
    """One-way latency, seconds."""
    rate: float
    """Bandwidth, bytes per second, the mean of both directions."""

    @property
    def between_hosts(self) -> bool:
        """Whether the ranks are on different hosts."""
        return self.hosts[0] != self.hosts[1]

    def __str__(self) -> str:
        (a, b), (i, j) = self.hosts, self.ranks
        return f"host {a} -> host {b} (rank {i} -> {j}, {self.kind})"


@dataclass(frozen=True)
class Reduction:
    """An all-reduce in a group of the layout."""

    kind: str
    size: int
    latency: float
    """Time of a few bytes, seconds."""
    rate: float
    """Bus bandwidth, 2 (n - 1) / n x bytes / seconds: comparable with a connection's bandwidth."""


def ring_rounds(size: int) -> list[list[tuple[int, int]]]:
    """Neighbours of a ring, in rounds of disjoint pairs (first sender, receiver)."""
    pairs = [(i, (i + 1) % size) for i in range(size if size > 2 else size - 1)]
    closing = pairs[-1:] if size > 2 and size % 2 else []
    open_ring = pairs[: len(pairs) - len(closing)]
    return [found for found in (open_ring[::2], open_ring[1::2], closing) if found]


def probe_links(
    kind: str,
    group: dist.ProcessGroup,
    runtime: Runtime,
    note: Callable[[str], None],
    *,
    batched: bool = True,
) -> Iterator[Link]:
    """Measure this rank's connections in a group; collective over the group.

    Args:
        kind: name of the group.
        group: a gloo or NCCL group.
        runtime: this rank.
        note: called with each action before it starts, to report it if it hangs.
        batched: send over the group's own connections. For a message outside of a batch, NCCL makes
            a communicator of the two ranks, which stays with its buffers for the whole run:
            right only where training sends so too.
    """
    if batched and runtime.device.type == "cuda":
        # NCCL connects a group at its first operation, in which all members must take part.
        note(f"all members of its {kind} group")
        dist.all_reduce(torch.zeros(1, device=runtime.device), group=group)
    message = partial(_message, group=group, batched=batched)
    ranks = dist.get_process_group_ranks(group)
    mine = ranks.index(dist.get_rank())
    for pairs in ring_rounds(len(ranks)):
        for first, second in pairs:
            if mine not in (first, second):
                continue
            a, b = ranks[first], ranks[second]
            other = b if mine == first else a
            note(f"an answer from {runtime.named(other)} ({kind} group)")
            if mine == second:
                _answer(other, message, runtime.device)
                continue
            latency, rate = _ask(other, message, runtime.device)
            yield Link(kind, (runtime.hosts[a], runtime.hosts[b]), (a, b), latency, rate)


def probe_reduction(kind: str, group: dist.ProcessGroup, device: torch.device) -> Reduction:
    """Measure latency and bus bandwidth of an all-reduce; collective over the group."""
    size, largest = _SMALLEST, _LARGEST[device.type]
    world = dist.get_world_size(group)

    def reduce(tensor: torch.Tensor) -> float:
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _finish(device)
        taken = torch.tensor(time.perf_counter() - started, device=device, dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)
        return float(taken)

    few = torch.zeros(2, device=device)
    latency = median([reduce(few) for _ in range(_ROUNDS + 2)][2:])
    while True:
        many = torch.zeros(size // 4, device=device)
        seconds = min(reduce(many) for _ in range(2))
        if seconds > _LONG_ENOUGH or size >= largest:
            break
        size *= _GROWTH
    return Reduction(kind, world, latency, 2 * (world - 1) / world * size / seconds)


def _ask(other: int, pass_on: Message, device: torch.device) -> tuple[float, float]:
    """Latency and bandwidth to a rank that runs `_answer`."""

    def round_trip(size: int) -> float:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        pass_on(dist.isend, torch.tensor([size], device=device), other)
        started = time.perf_counter()
        pass_on(dist.isend, message, other)
        pass_on(dist.irecv, message, other)
        _finish(device)
        return time.perf_counter() - started

    # The first messages open the connection.
    trips = [round_trip(8) for _ in range(_ROUNDS + 2)][2:]
    size = _SMALLEST
    while True:
        seconds = min(round_trip(size) for _ in range(2))
        if seconds > 2 * _LONG_ENOUGH or size >= _LARGEST[device.type]:
            break
        size *= _GROWTH
    pass_on(dist.isend, torch.tensor([0], device=device), other)
    return median(trips) / 2, 2 * size / seconds


def _answer(other: int, pass_on: Message, device: torch.device) -> None:
    size = torch.zeros(1, dtype=torch.int64, device=device)
    while True:
        pass_on(dist.irecv, size, other)
        if not int(size):
            return
        message = torch.empty(int(size), dtype=torch.uint8, device=device)
        pass_on(dist.irecv, message, other)
        pass_on(dist.isend, message, other)
        _finish(device)


def _message(
    operation: Callable[..., Any],
    tensor: torch.Tensor,
    other: int,
    *,
    group: dist.ProcessGroup,
    batched: bool,
) -> None:
    """Send or receive."""
    if batched:
        works = dist.batch_isend_irecv([dist.P2POp(operation, tensor, other, group)])
    else:
        works = [operation(tensor, other, group=group)]
    for work in works:
        work.wait()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slow_links(links: Sequence[Link]) -> list[str]:
    """Describe connections that are much slower than comparable ones.

    Comparable connections are of the same kind of group, and all within a host or all between
    hosts. The reference is the median (the better middle value of an even number, so that the worse
    of two connections is found).
    """
    found = []
    for like in _comparable(links):
        rate = median_high(link.rate for link in like)
        latency = -median_high(-link.latency for link in like)
        for link in like:
            if link.rate < _SLOW_RATE * rate:
                found.append(f"{link}: {rate_words(link.rate)}, others {rate_words(rate)}")
            elif link.latency > max(_SLOW_LATENCY * latency, _LEAST_LATENCY):
                found.append(f"{link}: {1e3 * link.latency:.3g} ms, others {1e3 * latency:.3g} ms")
    return found


def describe_links(links: Sequence[Link]) -> list[str]:
    """One line per kind of connection: count, latency, bandwidth, and the slowest."""
    lines = []
    for like in _comparable(links):
        worst = min(like, key=lambda link: link.rate)
        where = "between hosts" if worst.between_hosts else "within a host"
        latency = median(link.latency for link in like)
        text = (
            f"{worst.kind}, {where}: {len(like)} link(s), {1e3 * latency:.3g} ms, "
            f"{rate_words(median(link.rate for link in like))}"
        )
        if len(like) > 1:
            text += f"; slowest {rate_words(worst.rate)}, {worst}"
        lines.append(text)
    return lines


def _comparable(links: Sequence[Link]) -> list[list[Link]]:
    classes: dict[Any, list[Link]] = {}
    for link in links:
        classes.setdefault((link.kind, link.between_hosts), []).append(link)
    return list(classes.values())


def rate_words(rate: float) -> str:
    """Bytes per second in MB/s or GB/s."""
    if rate >= 0.9995e9:
        return f"{rate / 1e9:.1f} GB/s"
    return f"{rate / 1e6:.0f} MB/s" if rate >= 1e7 else f"{rate / 1e6:.2g} MB/s"
