"""Where the ranks of one start meet.

torchrun keeps one store for all the starts of a group. What the processes of an earlier start left
there, gloo's addresses among it, would make those of a later one wait for the dead. Nothing in
the environment tells two starts apart on every node (a node counts its own restarts alone), so the
ranks agree on a name of their own first, and everything else happens under it.
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

from keel_megatron.config.errors import UserError
from keel_megatron.runtime.local_launch import STORE_LISTENER

_SECONDS_BETWEEN_LOOKS = 0.02
_SHOWN = 6
"""Differences of a rank that are told; a wrong file would have dozens."""


class CollectiveTimeoutError(RuntimeError):
    """A collective or message did not complete in `parallel.timeout_seconds`."""


def shared_store(timeout_seconds: float) -> Store:
    """The store that the launcher's variables name; that of `keel train --processes` is rank 0's.

    Args:
        timeout_seconds: longest wait for it.
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
    """The part of a store that the ranks of this start alone use; collective over them.

    Every other rank says hello under a name that no process had before; rank 0 answers each with
    the name of the start, until all have confirmed it.

    Args:
        store: shared by all ranks, and by those of earlier starts.
        rank: this rank.
        world_size: ranks of the run.
        timeout_seconds: longest wait for the others.

    Raises:
        CollectiveTimeoutError: some rank did not come; rank 0 names those.
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
    """See that all ranks say the same of everything in `facts`; collective.

    It needs no process group, so that ranks which would make different groups learn it here.

    Args:
        store: of this start (`meet`).
        rank: this rank.
        world_size: ranks of the run.
        host: this rank's host.
        facts: what must be equal, by name; JSON values.

    Raises:
        UserError: with every difference from rank 0; marked as reported on all but rank 0.
    """
    store = PrefixStore("agree", store)
    store.set(f"facts/{rank}", json.dumps([host, dict(facts)]))
    if rank == 0:
        told = [json.loads(store.get(f"facts/{other}")) for other in range(world_size)]
        verdict = differences(told)
        store.set("verdict", verdict)
        if verdict:  # the store may live in this process
            with suppress(DistStoreError):  # one that has died does not hear it
                heard = [f"heard/{other}" for other in range(1, world_size)]
                store.wait(heard, timedelta(seconds=10))
    else:
        verdict = store.get("verdict").decode()
        store.set(f"heard/{rank}", "")
    if verdict:
        raise UserError(verdict, reported=rank != 0)


def differences(told: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How ranks differ from rank 0, a line for each host and its differences; "" if in nothing.

    Args:
        told: every rank's host and facts, by rank.
    """
    main_host, expected = told[0]
    ranks_of: dict[str, list[int]] = {}
    for rank, (host, facts) in enumerate(told):
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
    head = f"the nodes are not alike; host {main_host} with rank 0 sets the norm"
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
