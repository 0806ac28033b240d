"""The arithmetic of blocks and flat ranges, against lists of element numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel_megatron.checkpoint.places import (
    NotFilledError,
    Place,
    boxes,
    check_filled,
    cut,
    even_ranges,
    runs,
)

# The machine may be busy.
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def places(draw: st.DrawFn, shape: tuple[int, ...]) -> Place:
    """A flat range of some block of a tensor."""
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    block = tuple(
        draw(st.integers(1, size - begin)) for size, begin in zip(shape, offset, strict=True)
    )
    numel = math.prod(block)
    start = draw(st.integers(0, numel - 1))
    return Place("x", shape, offset, block, start, draw(st.integers(start + 1, numel)))


def elements(place: Place) -> list[int]:
    """Numbers of a piece's elements in the global tensor, in the piece's order."""
    numbers = np.arange(math.prod(place.shape)).reshape(place.shape)
    axes = zip(place.offset, place.block, strict=True)
    block = numbers[tuple(slice(begin, begin + size) for begin, size in axes)]
    return block.reshape(-1)[place.start : place.stop].tolist()


@st.composite
def two_places(draw: st.DrawFn) -> tuple[Place, Place]:
    shape = draw(SHAPES)
    return draw(places(shape)), draw(places(shape))


@SETTINGS
@given(SHAPES.flatmap(places))
def test_boxes_tile_a_range(place: Place) -> None:
    found = []
    tiles = boxes(place.block, place.start, place.stop)
    numbers = np.arange(math.prod(place.block)).reshape(place.block)
    for box in tiles:
        axes = zip(box.offset, box.extents, strict=True)
        values = numbers[tuple(slice(begin, begin + size) for begin, size in axes)].reshape(-1)
        assert values.tolist() == list(range(box.start, box.start + values.size))
        found += values.tolist()
    assert found == list(range(place.start, place.stop))
    assert len(tiles) <= 2 * len(place.block) - 1


@SETTINGS
@given(two_places())
def test_runs_copy_what_two_pieces_share(pair: tuple[Place, Place]) -> None:
    there, here = pair
    source, target = np.array(elements(there)), np.full(here.numel, -1)
    copied = 0
    for run in runs(there, here):
        (start, extents, slices), (begin, sizes, where) = run.there, run.here
        values = source[start : start + math.prod(extents)].reshape(extents)[slices]
        target[begin : begin + math.prod(sizes)].reshape(sizes)[where] = values
        copied += run.numel
    shared = set(elements(there)) & set(elements(here))
    assert target.tolist() == [n if n in shared else -1 for n in elements(here)]
    assert copied == len(shared)


@st.composite
def filled(draw: st.DrawFn) -> list[Place]:
    """A tensor in blocks along one axis, even or not, each of them in flat ranges."""
    shape = draw(SHAPES)
    axis = draw(st.integers(0, len(shape) - 1))
    ends = sorted({*draw(st.lists(st.integers(1, shape[axis]), max_size=3)), shape[axis]})
    found = []
    for begin, end in zip([0, *ends], ends, strict=False):
        offset = tuple(begin if n == axis else 0 for n in range(len(shape)))
        block = tuple(end - begin if n == axis else size for n, size in enumerate(shape))
        numel = math.prod(block)
        stops = sorted({*draw(st.lists(st.integers(1, numel), max_size=3)), numel})
        found += [
            Place("x", shape, offset, block, start, stop)
            for start, stop in zip([0, *stops], stops, strict=False)
        ]
    return draw(st.permutations(found))


@SETTINGS
@given(filled(), st.data())
def test_a_filled_tensor_is_told_from_one_with_a_hole_or_an_overlap(
    pieces: list[Place], data: st.DataObject
) -> None:
    total = math.prod(pieces[0].shape)
    check_filled(pieces, total)
    chosen = data.draw(st.integers(0, len(pieces) - 1))
    others, one = pieces[:chosen] + pieces[chosen + 1 :], pieces[chosen]
    wrong = [[*others, one, one], [*others, replace(one, stop=one.stop + 1)]]
    if others:
        wrong += [others, [*others, replace(one, start=one.start + 1)]]
    for found in wrong:
        with pytest.raises(NotFilledError, match="x"):
            check_filled(found, sum(piece.numel for piece in found))


def test_blocks_of_one_volume_that_overlap_are_found() -> None:
    """As many elements as the tensor has, but some twice; and two that disagree."""
    blocks = [((0, 0), (2, 2)), ((1, 0), (2, 2)), ((3, 0), (1, 2))]
    pieces = [Place("x", (4, 2), o, b, 0, math.prod(b)) for o, b in blocks]
    assert sum(piece.numel for piece in pieces) == 10
    for found in (pieces, pieces[:2], [pieces[0], replace(pieces[1], shape=(5, 2))]):
        with pytest.raises(NotFilledError):
            check_filled(found, sum(piece.numel for piece in found))
    check_filled([pieces[0], replace(pieces[1], offset=(2, 0))], 8)


def test_a_tensor_without_a_piece_is_missed() -> None:
    whole = Place("x", (4,), (0,), (4,), 0, 4)
    with pytest.raises(NotFilledError, match="the pieces hold 4 of 8 elements"):
        check_filled([whole], 8)
    check_filled([whole, replace(whole, key="y")], 8)


@SETTINGS
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_a_range_of_consecutive_blocks_is_cut(sizes: list[int], data: st.DataObject) -> None:
    """Each block as a tensor of its own, whose elements are numbered on."""
    blocks = [Place(str(n), (size,), (0,), (size,), 0, size) for n, size in enumerate(sizes)]
    numbers = [(str(n), i) for n, size in enumerate(sizes) for i in range(size)]
    start = data.draw(st.integers(0, len(numbers)))
    stop = data.draw(st.integers(start, len(numbers)))
    found, position = [], 0
    for place, begin in cut(blocks, start, stop):
        assert begin == position
        assert place.is_whole == (place.numel == sizes[int(place.key)])
        found += [(place.key, i) for i in range(place.start, place.stop)]
        position += place.numel
    assert found == numbers[start:stop]


@SETTINGS
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 5))
def test_ranks_share_tensors_evenly(sizes: list[int], count: int) -> None:
    shares = [even_ranges(sizes, rank, count) for rank in range(count)]
    for number, size in enumerate(sizes):
        held = [i for share in shares for i in range(*share[number])]
        assert held == list(range(size))
    totals = [sum(stop - start for start, stop in share) for share in shares]
    assert max(totals) - min(totals) <= 1


def test_pieces_of_one_block_have_names_of_their_own() -> None:
    whole = Place("x", (4, 2), (2, 0), (2, 2), 0, 4)
    assert whole.name == "x[2,0]"
    assert replace(whole, stop=3).name == "x[2,0][0:3]"
