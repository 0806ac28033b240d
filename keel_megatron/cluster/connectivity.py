"""Connectivity probe: which hosts can connect to each other, tested when a run hangs."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch.distributed as dist

from keel_megatron.runtime.distributed import Runtime

ANSWER_SECONDS = 1.0
"""Timeout for a host to answer, seconds; a working network takes milliseconds."""
_ASKED = 64
"""Number of hosts that each host tests."""


class Doorbells:
    """A listening socket on each host, for connection tests; no data is sent.

    Collective over all ranks. Does nothing on a single host.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._others: dict[str, tuple[str, int]] = {}
        self._socket: socket.socket | None = None
        if len(set(runtime.hosts)) == 1:
            return
        mine: tuple[str, str, int] | None = None
        if runtime.launch.local_rank == 0:
            self._socket = socket.create_server(("", 0), backlog=_ASKED)
            mine = (runtime.host, _own_address(runtime), self._socket.getsockname()[1])
        gathered: list[tuple[str, str, int] | None] = [mine] * runtime.launch.world_size
        dist.all_gather_object(gathered, mine)
        if mine is not None:
            known = {host: (address, port) for host, address, port in filter(None, gathered)}
            names = list(known)
            first = names.index(runtime.host) + 1  # the next ones, in a ring
            for name in (names[first:] + names[: first - 1])[:_ASKED]:
                self._others[name] = known[name]

    def unanswered(self) -> list[str]:
        """The hosts to which this one cannot connect; empty if it does not test."""
        if not self._others:
            return []
        with ThreadPoolExecutor(len(self._others)) as pool:
            reached = pool.map(_reached, self._others.values())
            return [host for host, answer in zip(self._others, reached, strict=True) if not answer]

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            self._socket.close()


def cut_off(unanswered: Mapping[str, Sequence[str]]) -> str | None:
    """Describe which hosts are disconnected; None if all are connected.

    Args:
        unanswered: for each testing host, the hosts that did not answer.
    """
    pairs = {frozenset((host, other)) for host, others in unanswered.items() for other in others}
    if not pairs:
        return None
    counts = Counter(host for pair in pairs for host in pair)
    (host, count), *rest = counts.most_common()
    if count > 1 and (not rest or rest[0][1] < count):
        others = sorted(next(iter(pair - {host})) for pair in pairs if host in pair)
        return f"host {host} is cut off: no connection to {', '.join(others)}"
    a, b = sorted(next(iter(sorted(pairs, key=sorted))))
    return f"the hosts {a} and {b} do not reach each other"


def _own_address(runtime: Runtime) -> str:
    """This host's address for the others: that of the route to the first node."""
    main = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if runtime.host == runtime.hosts[0]:
        return main
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((main, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return runtime.host


def _reached(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
