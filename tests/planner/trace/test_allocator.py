"""The allocator's rules on sequences whose outcome is known by hand."""

from __future__ import annotations

import random

import pytest

from keel_megatron.planner.trace.allocator import MIB, CachingAllocator

BOTH = pytest.mark.parametrize("expandable", [False, True])


def run(steps: list[tuple[str, int]], *, expandable: bool = False) -> list[int]:
    """MiB reserved after every step: ("name", MiB) allocates, ("name", 0) frees."""
    allocator, keys, found = CachingAllocator(expandable=expandable), {}, []
    for name, size in steps:
        key = keys.setdefault(name, len(keys))
        if size:
            allocator.malloc(key, size * MIB)
        else:
            allocator.free(key)
        found.append(allocator.reserved // MIB)
    return found


@BOTH
def test_small_tensors_share_segments_of_two_mebibytes(expandable: bool) -> None:
    allocator = CachingAllocator(expandable=expandable)
    for key in range(4096):
        allocator.malloc(key, 1)  # 512 bytes each
        assert allocator.reserved == 2 * MIB
    allocator.malloc(4096, 513)
    assert allocator.reserved == 4 * MIB


def test_segments_of_large_tensors() -> None:
    # Below 10 MiB a segment is 20 MiB, from there a tensor's own size in whole 2 MiB.
    assert run([("a", 9), ("b", 9)]) == [20, 20]
    assert run([("a", 11)]) == [12]
    assert run([("a", 9), ("b", 12)]) == [20, 32]


def test_a_rest_of_a_mebibyte_is_not_split_off() -> None:
    # Of 12 MiB 11 are taken: the last is lost for as long as they live.
    assert run([("a", 12), ("a", 0), ("b", 11), ("c", 2)]) == [12, 12, 12, 32]
    assert run([("a", 14), ("a", 0), ("b", 12), ("c", 2)]) == [14, 14, 14, 14]


def test_the_smallest_free_block_is_taken_and_neighbours_are_joined() -> None:
    steps = [("a", 30), ("b", 20), ("a", 0), ("b", 0), ("c", 20), ("d", 30)]
    assert run(steps) == [30, 50, 50, 50, 50, 50]
    # Two halves of one segment are one block again when both are free.
    steps = [("a", 40), ("a", 0), ("b", 20), ("c", 20), ("b", 0), ("c", 0), ("d", 40)]
    assert run(steps)[-1] == 40


def test_segments_do_not_join_but_what_expands_does() -> None:
    steps = [("a", 20), ("b", 20), ("a", 0), ("b", 0), ("c", 40)]
    assert run(steps) == [20, 40, 40, 40, 80]
    assert run(steps, expandable=True) == [20, 40, 40, 40, 40]


def test_a_range_expands_at_its_end_by_what_is_missing() -> None:
    # 30 of 40 MiB are used; a free end of 10 MiB grows by one page of 20 for a tensor of 30.
    assert run([("a", 30), ("b", 30)], expandable=True) == [40, 60]
    # The free end is kept for what needs it: the hole in the middle is taken first.
    steps = [("a", 20), ("b", 20), ("c", 5), ("a", 0), ("d", 15), ("e", 15)]
    assert run(steps, expandable=True) == [20, 40, 60, 60, 60, 60]


@BOTH
def test_all_is_one_block_a_segment_again_when_nothing_is_left(expandable: bool) -> None:
    chance, allocator = random.Random(0), CachingAllocator(expandable=expandable)
    live: dict[int, int] = {}
    for key in range(2000):
        if live and chance.random() < 0.45:
            gone = chance.choice(list(live))
            allocator.free(gone)
            live.pop(gone)
        else:
            live[key] = int(2 ** chance.uniform(5, 27))
            allocator.malloc(key, live[key])
        assert allocator.reserved >= sum(live.values())
    for key in live:
        allocator.free(key)
    for pool in allocator._pools:
        assert sum(size for size, _address in pool.free) == pool.reserved
        assert all(block.free for block in pool.blocks.values())
        if expandable:
            assert len(pool.blocks) == 1
