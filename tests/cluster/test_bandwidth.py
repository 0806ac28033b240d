"""The probe of links: who plays with whom, what counts as slow, and real ranks."""

from __future__ import annotations

import pytest

from keel_megatron.cluster.bandwidth import (
    Link,
    describe_links,
    probe_links,
    probe_reduction,
    rate_words,
    ring_rounds,
    slow_links,
)
from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.settings import settings


@pytest.mark.parametrize("size", range(2, 10))
def test_a_ring_is_played_in_rounds_of_disjoint_pairs(size: int) -> None:
    rounds = ring_rounds(size)
    assert len(rounds) == (1 if size == 2 else 2 + size % 2)
    for pairs in rounds:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))
    played = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert played == {frozenset((i, (i + 1) % size)) for i in range(size)}


def link(a: str, b: str, rate: float, latency: float = 1e-4, kind: str = "pipeline") -> Link:
    return Link(kind, (a, b), (ord(a), ord(b)), latency, rate)


def test_slow_links_are_named_beside_their_like() -> None:
    ring = [link("a", "b", 900e6), link("b", "c", 12e6), link("c", "d", 880e6)]
    (found,) = slow_links(ring)
    assert found == "host b -> host c (rank 98 -> 99, pipeline): 12 MB/s, others 880 MB/s"
    # Of two, the worse one; alone, nothing can be said; a slower kind is no outlier.
    assert len(slow_links([link("a", "b", 900e6), link("b", "c", 12e6)])) == 1
    assert slow_links([link("a", "b", 12e6)]) == []
    inside = [link("a", "a", 90e9), link("b", "b", 80e9)]
    assert slow_links([*inside, link("a", "b", 9e9), link("b", "a", 8e9)]) == []
    late = [link("a", "b", 9e8), link("b", "c", 9e8, latency=0.04), link("c", "d", 9e8)]
    (found,) = slow_links(late)
    assert found.endswith(": 40 ms, others 0.1 ms")


def test_a_line_for_each_kind() -> None:
    lines = describe_links([link("a", "b", 9e8), link("b", "c", 7e8), link("a", "a", 2e10)])
    assert lines == [
        "pipeline, between hosts: 2 link(s), 0.1 ms, 800 MB/s; slowest 700 MB/s, host b -> host c "
        "(rank 98 -> 99, pipeline)",
        "pipeline, within a host: 1 link(s), 0.1 ms, 20.0 GB/s",
    ]
    assert [rate_words(rate) for rate in (1.2e9, 999.9e6, 12e6, 1.04e6)] == [
        "1.2 GB/s", "1.0 GB/s", "12 MB/s", "1 MB/s",
    ]  # fmt: skip


def probe(sections: dict, batched: bool) -> tuple:
    import torch.distributed as dist

    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        world, notes = dist.group.WORLD, []
        assert world is not None
        batches = []
        with pytest.MonkeyPatch.context() as patch:
            send = dist.batch_isend_irecv
            patch.setattr(dist, "batch_isend_irecv", lambda ops: batches.extend(ops) or send(ops))
            links = list(probe_links("world", world, runtime, notes.append, batched=batched))
        assert bool(batches) == batched
        return links, probe_reduction("world", world, runtime.device), notes


@pytest.mark.parametrize("batched", [True, False])
def test_real_ranks_measure_each_link_once(batched: bool) -> None:
    """In batches, so that NCCL makes no communicator for each pair of ranks."""
    found = run_ranks(3, probe, settings(), batched)
    ranks = [link.ranks for links, _, _ in found for link in links]
    assert sorted(ranks) == [(0, 1), (1, 2), (2, 0)]
    for links, reduction, notes in found:
        assert all(link.rate > 0 and link.latency > 0 for link in links)
        assert reduction.size == 3
        assert reduction.rate > 0
        assert all(note.startswith("an answer from rank ") for note in notes)
        assert len(notes) == 2  # each neighbour
