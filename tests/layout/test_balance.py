"""The assignment against every other assignment, and its speed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.layout.balance import Recompute, StageShare, assign_blocks
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.memory import MemoryModel
from keel_megatron.layout.recomputation import Recomputation
from keel_megatron.layout.times import HostTimes, Times, UnitTimes, predicted_times
from tests.calls import calls_of
from tests.settings import small_config


def unit_times(embedding: float, block: float, head: float) -> UnitTimes:
    """Quarters are exact in binary, so that equal times compare equal."""
    return UnitTimes(*(Times(0.25 * t, 0.75 * t) for t in (embedding, block, head)))


def all_counts(blocks: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to spread blocks over stages in order."""
    for bars in itertools.combinations(range(blocks + stages - 1), stages - 1):
        edges = (-1, *bars, blocks + stages - 1)
        yield tuple(b - a - 1 for a, b in itertools.pairwise(edges))


def seconds(
    stage: int, stages: int, blocks: Sequence[int], times: UnitTimes, recompute: Recompute
) -> float | None:
    """A stage's time, computed independently of the assignment."""
    again = recompute(stage, blocks)
    if again is None:
        return None
    total = sum(blocks) * (times.block.forward + times.block.backward)
    total += sum(again.full) * times.block.forward
    total += times.embedding.total if stage == 0 else 0.0
    return total + (times.head.total if stage == stages - 1 else 0.0)


def best(blocks: int, stages: int, times: UnitTimes, recompute: Recompute) -> list[float] | None:
    """Times, slowest first, of the best of all cuts: the slowest, then the next, and so on."""
    found = None
    for counts in all_counts(blocks, stages):
        each = [seconds(r, stages, (n,), times, recompute) for r, n in enumerate(counts)]
        if any(n == 0 for n in counts[1:-1]) or None in each:
            continue
        ordered = sorted((t for t in each if t is not None), reverse=True)
        found = ordered if found is None else min(found, ordered)
    return found


def once(full: tuple[int, ...]) -> Recomputation:
    """So many blocks per chunk fully, none lightly."""
    return Recomputation(full, (0,) * len(full))


QUARTERS = st.integers(0, 40).map(lambda n: n / 4)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), QUARTERS, QUARTERS, st.data())
def test_no_cut_is_better(
    blocks: int, stages: int, embedding: float, head: float, data: st.DataObject
) -> None:
    """Of all contiguous cuts, with stages that hold a limited number and recompute some."""
    blocks = max(blocks, stages)
    times = unit_times(embedding, 1.0, head)
    drawn = st.lists(st.integers(1, 9), min_size=stages, max_size=stages)
    most, free = data.draw(drawn), data.draw(drawn)

    def recompute(stage: int, counts: Sequence[int]) -> Recomputation | None:
        total = sum(counts)
        return None if total > most[stage] else once((max(0, total - free[stage]),))

    found = assign_blocks(blocks, stages, 1, times, recompute)
    expected = best(blocks, stages, times, recompute)
    if found is None:
        assert expected is None
        return
    assert sum(sum(share.blocks) for share in found) == blocks
    assert sorted((share.seconds for share in found), reverse=True) == expected


@settings(deadline=None)
@given(st.integers(2, 4), st.integers(2, 3), st.integers(0, 20), QUARTERS, QUARTERS)
def test_chunks_of_a_stage_are_even_and_the_slowest_stage_is_as_without_them(
    stages: int, virtual: int, more: int, embedding: float, head: float
) -> None:
    blocks = stages * virtual - 2 + more
    times = unit_times(embedding, 1.0, head)
    found = assign_blocks(blocks, stages, virtual, times)
    assert found is not None
    assert sum(sum(share.blocks) for share in found) == blocks
    fixed = [[0.0] * virtual for _ in range(stages)]
    fixed[0][0], fixed[-1][-1] = embedding, head
    for share, extra in zip(found, fixed, strict=True):
        loads = [n + e for n, e in zip(share.blocks, extra, strict=True)]
        # No block could be taken from a chunk and leave it as slow as another one.
        for a, b in itertools.permutations(range(virtual), 2):
            least = 0 if extra[a] or (share is found[0] and a == 0) else 1
            if share.blocks[a] > least and not (share is found[-1] and a == virtual - 1):
                assert loads[a] - 1 <= loads[b]
    least_blocks = [virtual - (r == 0) - (r == stages - 1) for r in range(stages)]
    slowest = min(
        max(sum(fixed[r]) + counts[r] for r in range(stages))
        for counts in all_counts(blocks, stages)
        if all(n >= least for n, least in zip(counts, least_blocks, strict=True))
    )
    assert max(share.seconds for share in found) == slowest


def test_a_large_head_gets_a_stage_of_its_own_and_so_may_the_embedding() -> None:
    def counts(shares: list[StageShare] | None) -> list[tuple[int, ...]]:
        assert shares is not None
        return [share.blocks for share in shares]

    assert counts(assign_blocks(9, 4, 1, unit_times(0.0, 1.0, 9.0))) == [(3,), (3,), (3,), (0,)]
    assert counts(assign_blocks(8, 3, 1, unit_times(9.0, 1.0, 9.0))) == [(0,), (8,), (0,)]
    assert counts(assign_blocks(3, 2, 2, unit_times(0.0, 1.0, 9.0))) == [(1, 1), (1, 0)]


def test_among_equally_fast_cuts_the_most_even_one_is_taken() -> None:
    """The fifth block makes stage 0 or stage 2 take 3.25; stage 0 would be the slower otherwise."""

    def recompute(stage: int, counts: Sequence[int]) -> Recomputation | None:
        total, most = sum(counts), (1, 1, 3, 1)[stage]
        return None if total > most else once((int(total == 3),))

    found = assign_blocks(5, 4, 1, unit_times(2.25, 1.0, 0.0), recompute)
    assert found is not None
    assert [share.seconds for share in found] == [3.25, 1.0, 2.0, 1.0]


def test_what_does_not_fit_is_said() -> None:
    def two_a_stage(_stage: int, counts: Sequence[int]) -> Recomputation | None:
        return once((0,)) if sum(counts) <= 2 else None

    assert assign_blocks(6, 3, 1, unit_times(0.0, 1.0, 0.0), two_a_stage) is not None
    assert assign_blocks(7, 3, 1, unit_times(0.0, 1.0, 0.0), two_a_stage) is None
    with pytest.raises(ValueError, match="too few"):
        assign_blocks(1, 4, 1, unit_times(0.0, 1.0, 0.0))


@pytest.mark.parametrize("virtual", [1, 4])
def test_4096_blocks_on_512_stages_take_few_calls(virtual: int) -> None:
    """Under a memory limit that makes the early stages recompute: below a second of Python."""
    config = small_config(
        model__blocks=4096,
        parallel__pipeline=512,
        parallel__virtual_pipeline=virtual,
        parallel__recompute="auto",
        training__global_batch_size=4096,
    )
    costs = model_costs(config)
    memory = MemoryModel(config, costs, 1)
    fullest = memory.stage(0, (8 // virtual,) * virtual, (0,) * virtual).total
    limit = 0.6 * fullest
    times = predicted_times(costs, DEVICES["h200"])
    shares, calls = calls_of(
        lambda: assign_blocks(
            4096, 512, virtual, times, lambda r, n: memory.recomputation(r, n, limit)
        )
    )
    assert shares is not None
    assert sum(sum(share.blocks) for share in shares) == 4096
    assert sum(map(sum, shares[0].again)) > sum(map(sum, shares[-1].again))
    assert calls < 3_000_000


def test_stages_of_which_the_host_is_the_limit_are_balanced_by_its_time() -> None:
    """The head is long on the device and short on the host: the last stage has more blocks."""
    plain = unit_times(1.0, 1.0, 8.0)
    host = HostTimes(Times(1.0, 1.5), chunk=Times(0.0, 0.0), end=Times(0.1, 0.1), light=0.0)
    shares = {
        name: assign_blocks(40, 4, 1, times)
        for name, times in (("device", plain), ("host", replace(plain, host=host)))
    }
    ends = {name: found[-1].blocks[0] for name, found in shares.items() if found}
    assert ends["device"] < ends["host"] <= 10
    assert shares["host"] is not None
    assert max(one.seconds for one in shares["host"]) == pytest.approx(2.5 * 10, rel=0.1)
