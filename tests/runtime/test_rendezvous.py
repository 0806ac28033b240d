"""The ranks of a start find each other in a store that earlier starts have used."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import Store, TCPStore

from keel_megatron.runtime.rendezvous import CollectiveTimeoutError, meet
from tests.hosts import await_that


def client(server: TCPStore) -> Store:
    return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def start(server: TCPStore, ranks: int, late: int | None = None) -> list[Store]:
    """What every rank of a start gets; one of them comes when the others have said hello."""
    hellos = [f"keel/hello/{rank}" for rank in range(1, ranks) if rank != late]
    earlier = {key: server.get(key) for key in hellos if server.check([key])}

    def one(rank: int) -> Store:
        store = client(server)
        if rank == late:
            await_that(
                lambda: all(
                    store.check([key]) and store.get(key) != earlier.get(key) for key in hellos
                ),
                300,
                "the others",
            )
        return meet(store, rank, ranks, 300.0)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


@pytest.mark.parametrize("late", [None, 0, 2])
def test_a_start_shares_its_keys_and_sees_no_earlier_ones(
    server: TCPStore, late: int | None
) -> None:
    seen = set()
    for number in range(3):
        stores = start(server, 3, late)
        assert not any(store.check(["address"]) for store in stores)
        stores[0].set("address", str(number))
        assert {store.get("address") for store in stores} == {str(number).encode()}
        seen.add(stores[0].get("address"))
    assert len(seen) == 3


def test_a_rank_that_died_before_all_had_met_confuses_nobody(server: TCPStore) -> None:
    """Rank 1 of the first start says hello and is gone; rank 0 never comes."""
    gone = threading.Thread(target=lambda: lost(server), daemon=True)
    gone.start()
    gone.join()
    stores = start(server, 2, late=1)
    stores[1].set("key", "value")
    assert stores[0].get("key") == b"value"


def lost(server: TCPStore) -> None:
    with pytest.raises(CollectiveTimeoutError, match=r"rank 1 waited .* for rank 0 to start"):
        meet(client(server), 1, 2, 0.3)


def test_who_does_not_come_is_named(server: TCPStore) -> None:
    with pytest.raises(CollectiveTimeoutError, match=r"for rank\(s\) 1, 2 to start"):
        meet(client(server), 0, 3, 0.3)
