"""Rendezvous of the ranks of one start.

torchrun keeps one store for all starts of a group. Keys of an earlier start, such as gloo's
addresses, would make later processes wait for dead ones. The environment does not identify a start
on every node (each node counts only its own restarts), so the ranks first agree on a name and use
it as a prefix.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistStoreError
from torch.distributed.rendezvous import rendezvous

from keel_megatron.errors import UserError
from keel_megatron.runtime.local_launch import STORE_LISTENER

_SECONDS_BETWEEN_LOOKS = 0.02
_SHOWN = 6
"""Maximum differences shown per rank; a wrong file has dozens."""


class CollectiveTimeoutError(RuntimeError):
    """A collective or message did not complete in `parallel.timeout_seconds`."""


def shared_store(timeout_seconds: float) -> Store:
    """The store of the launcher's variables; under `keel train --processes`, rank 0 hosts it.

    Args:
        timeout_seconds: timeout of the connection.
    """
    timeout = timedelta(seconds=timeout_seconds)
    listener = os.environ.pop(STORE_LISTENER, None)
    if listener is None:
        return next(rendezvous("env://", timeout=timeout))[0]
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(listener),
    )


def meet(store: Store, rank: int, world_size: int, timeout_seconds: float) -> Store:
    """A store with a prefix that only the ranks of this start use; collective over them.

    Every other rank registers under a unique name; rank 0 answers each with the name of the start,
    until all have confirmed it.

    Args:
        store: shared by all ranks, and by those of earlier starts.
        rank: this rank.
        world_size: ranks of the run.
        timeout_seconds: longest wait for the others.

    Raises:
        CollectiveTimeoutError: a rank is missing; rank 0 names it.
    """
    store = PrefixStore("keel", store)
    mine = uuid.uuid4().hex
    if rank:
        name = _join(store, rank, mine, timeout_seconds)
    else:
        name = mine
        _gather(store, set(range(1, world_size)), name, timeout_seconds)
    return PrefixStore(name, store)


def agree(store: Store, rank: int, world_size: int, host: str, facts: Mapping[str, Any]) -> None:
    """Check that `facts` are identical on all ranks; collective.

    It needs no process group, because ranks with different configurations would create different
    groups.

    Args:
        store: the store of this start (`meet`).
        rank: this rank.
        world_size: ranks of the run.
        host: this rank's host.
        facts: what must be identical, by name; JSON values.

    Raises:
        UserError: lists every difference from rank 0; marked as reported on all but rank 0.
    """
    store = PrefixStore("agree", store)
    store.set(f"facts/{rank}", json.dumps([host, dict(facts)]))
    if rank == 0:
        gathered = [json.loads(store.get(f"facts/{other}")) for other in range(world_size)]
        verdict = differences(gathered)
        store.set("verdict", verdict)
        if verdict:  # the store may live in this process
            with suppress(DistStoreError):  # a dead rank does not answer
                heard = [f"heard/{other}" for other in range(1, world_size)]
                store.wait(heard, timedelta(seconds=10))
    else:
        verdict = store.get("verdict").decode()
        store.set(f"heard/{rank}", "")
    if verdict:
        raise UserError(verdict, reported=rank != 0)


def differences(gathered: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Differences from rank 0, one line per host; "" if there are none.

    Args:
        gathered: host and facts of every rank, by rank.
    """
    main_host, expected = gathered[0]
    ranks_of: dict[str, list[int]] = {}
    for rank, (host, facts) in enumerate(gathered):
        found = [
            f"{name} is {facts.get(name, 'absent')}, not {expected.get(name, 'absent')}"
            for name in [*expected, *(name for name in facts if name not in expected)]
            if facts.get(name, "absent") != expected.get(name, "absent")
        ]
        if found:
            shown = "; ".join(found[:_SHOWN])
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            ranks_of.setdefault(f"host {host}: {shown}{more}", []).append(rank)
    if not ranks_of:
        return ""
    lines = [f"  {line} (rank {_listed(ranks)})" for line, ranks in ranks_of.items()]
    head = f"the nodes differ; compared with host {main_host}, which has rank 0"
    return "\n".join([head, *lines])


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _join(store: Store, rank: int, mine: str, timeout_seconds: float) -> str:
    store.set(f"hello/{rank}", mine)
    try:
        store.wait([f"welcome/{mine}"], timedelta(seconds=timeout_seconds))
    except DistStoreError as error:
        raise CollectiveTimeoutError(
            f"rank {rank} waited more than parallel.timeout_seconds = {timeout_seconds:g} for "
            "rank 0 to start"
        ) from error
    name = store.get(f"welcome/{mine}").decode()
    store.set(f"met/{mine}/{name}", "")
    return name


def _gather(store: Store, missing: set[int], name: str, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    answered: dict[int, str] = {}
    while missing:
        for rank in sorted(missing):
            if not store.check([f"hello/{rank}"]):
                continue
            who = store.get(f"hello/{rank}").decode()  # perhaps that of an earlier start
            if answered.get(rank) != who:
                answered[rank] = who
                store.set(f"welcome/{who}", name)
            if store.check([f"met/{who}/{name}"]):
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            raise CollectiveTimeoutError(
                f"rank 0 waited more than parallel.timeout_seconds = {timeout_seconds:g} for "
                f"rank(s) {', '.join(map(str, sorted(missing)))} to start"
            )
        if missing:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
