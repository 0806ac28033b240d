"""Where the ranks of one start meet.

torchrun keeps one store for all the starts of a group. What the processes of an earlier start left
there, gloo's addresses among it, would make those of a later one wait for the dead. Nothing in
the environment tells two starts apart on every node (a node counts its own restarts alone), so the
ranks agree on a name of their own first, and everything else happens under it.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistStoreError

_SECONDS_BETWEEN_LOOKS = 0.02


class CollectiveTimeoutError(RuntimeError):
    """A collective or message did not complete in `parallel.timeout_seconds`."""


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
