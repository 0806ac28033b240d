"""Where a piece of a tensor belongs: arithmetic of blocks and flat ranges. No torch here.

A rank's part of a parameter is a block of the global tensor (tensor parallelism splits along an
axis), and the distributed optimizer owns a range of that block's elements in row-major order, which
begins and ends anywhere. So a piece in a checkpoint is a flat range of a block. Between two layouts
the blocks differ, and a range of one is many row runs of the other. Both are tiled with boxes, at
most 2 x dimensions - 1 of them, each contiguous in its piece, and boxes intersect axis by axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

Slices = tuple[slice, ...]


class NotFilledError(Exception):
    """The pieces of a tensor leave elements out, or overlap; the message names the tensor."""


@dataclass(frozen=True)
class Place:
    """Where a piece belongs in its global tensor: a flat range of a block."""

    key: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Of the global tensor."""
    offset: tuple[int, ...]
    """Of the block in it."""
    block: tuple[int, ...]
    """Shape of the block, with as many axes as the global tensor."""
    start: int
    """First element, in row-major order within the block."""
    stop: int
    """One past the last element."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the piece is all of its block."""
        return (self.start, self.stop) == (0, math.prod(self.block))

    @property
    def name(self) -> str:
        """Of the tensor in the file, unique within a rank's."""
        block = f"{self.key}[{','.join(map(str, self.offset))}]"
        return block if self.is_whole else f"{block}[{self.start}:{self.stop}]"


def whole(key: str, shape: tuple[int, ...]) -> Place:
    """All of a tensor."""
    return Place(key, shape, (0,) * len(shape), shape, 0, math.prod(shape))


@dataclass(frozen=True)
class Box:
    """Consecutive elements of a block that form a box."""

    start: int
    """Of its first element, in row-major order within the block."""
    offset: tuple[int, ...]
    """Within the block."""
    extents: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """What two pieces share of one box each: `flat[start:stop].view(extents)[slices]` of either."""

    there: tuple[int, tuple[int, ...], Slices]
    """Start in the saved piece, extents of its box, and which of its elements."""
    here: tuple[int, tuple[int, ...], Slices]
    numel: int


def cut(blocks: Sequence[Place], start: int, stop: int) -> list[tuple[Place, int]]:
    """Pieces of consecutive whole blocks that hold the elements [start, stop) of all of them.

    Args:
        blocks: whole blocks, one after the other, as they lie in a parameter.
        start: first element, counted through all blocks.
        stop: one past the last element.

    Returns:
        The pieces that are not empty, and the position of each after `start`.
    """
    found, begin = [], 0
    for block in blocks:
        first, last = max(start - begin, 0), min(stop - begin, block.numel)
        if first < last:
            found.append((replace(block, start=first, stop=last), begin + first - start))
        begin += block.numel
    return found


def even_ranges(sizes: Sequence[int], rank: int, count: int) -> list[tuple[int, int]]:
    """The part of each tensor that falls to one of `count` ranks, if they share all evenly.

    The tensors are taken as one, which is split into parts that differ by one element at most.
    """
    total, begin, found = sum(sizes), 0, []
    first, last = total * rank // count, total * (rank + 1) // count
    for size in sizes:
        found.append((min(max(first - begin, 0), size), min(max(last - begin, 0), size)))
        begin += size
    return found


def boxes(extents: Sequence[int], start: int, stop: int) -> list[Box]:
    """Boxes that tile the elements [start, stop) of a block, in order and without overlap."""
    if start >= stop:
        return []
    if not extents:
        return [Box(0, (), ())]
    row = math.prod(extents[1:])
    found = []
    position = start
    while position < stop:
        index, within = divmod(position, row)
        rows = (stop - position) // row
        if within == 0 and rows:  # the middle: whole rows
            rest = tuple(extents[1:])
            found.append(Box(position, (index, *(0 for _ in rest)), (rows, *rest)))
            position += rows * row
            continue
        until = min((index + 1) * row, stop)
        for box in boxes(extents[1:], within, until - index * row):
            place = (index, *box.offset), (1, *box.extents)
            found.append(Box(index * row + box.start, *place))
        position = until
    return found


def runs(there: Place, here: Place) -> Iterator[Run]:
    """What a saved piece and a wanted one share, as copies between their flat values."""
    if (there.offset, there.block) == (here.offset, here.block):
        first, last = max(there.start, here.start), min(there.stop, here.stop)
        if first < last:
            size, all_of_it = last - first, (slice(None),)
            yield Run(
                (first - there.start, (size,), all_of_it),
                (first - here.start, (size,), all_of_it),
                size,
            )
        return
    if None in _overlap(there.offset, there.block, here.offset, here.block):
        return
    mine = boxes(here.block, here.start, here.stop)
    for one in boxes(there.block, there.start, there.stop):
        for other in mine:
            from_, to = _overlap(
                _sum(there.offset, one.offset),
                one.extents,
                _sum(here.offset, other.offset),
                other.extents,
            )
            if from_ is not None and to is not None:
                yield Run(
                    (one.start - there.start, one.extents, from_),
                    (other.start - here.start, other.extents, to),
                    math.prod(part.stop - part.start for part in from_),
                )


def check_filled(places: Iterable[Place], expected: int) -> None:
    """See that the pieces of every tensor hold each of its elements exactly once.

    Args:
        places: of all ranks.
        expected: elements of all tensors, by which a tensor without a piece is missed.

    Raises:
        NotFilledError: those of one do not, or there is no piece of one.
    """
    places = list(places)
    tensors: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], list[Place]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places:
        if shapes.setdefault(place.key, place.shape) != place.shape:
            raise NotFilledError(f"two pieces of {place.key} disagree about its shape")
        blocks = tensors.setdefault(place.key, {})
        blocks.setdefault((place.offset, place.block), []).append(place)
    for key, found in tensors.items():
        for pieces in found.values():
            _check_block(pieces)
        volume = sum(math.prod(block) for _offset, block in found)
        if volume != math.prod(shapes[key]) or not _fit(list(found), shapes[key]):
            raise NotFilledError(f"the pieces of {key} do not fill it")
    if (held := sum(place.numel for place in places)) != expected:
        raise NotFilledError(f"the pieces hold {held} of {expected} elements")


def _check_block(pieces: list[Place]) -> None:
    """See that ranges follow each other from a block's first element to its last."""
    ordered = sorted(pieces, key=lambda piece: (piece.start, piece.stop))
    follow = all(one.stop == other.start for one, other in pairwise(ordered))
    ends = (ordered[0].start, ordered[-1].stop) == (0, math.prod(pieces[0].block))
    if not follow or not ends or any(piece.numel <= 0 for piece in pieces):
        name = f"{pieces[0].key} at {list(pieces[0].offset)}"
        raise NotFilledError(f"the pieces of {name} do not fill their block")


def _fit(blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """Whether blocks lie within a tensor and do not overlap."""
    for offset, block in blocks:
        if len(offset) != len(shape) or len(block) != len(shape):
            return False
        axes = zip(offset, block, shape, strict=True)
        if any(begin < 0 or begin + extent > size for begin, extent, size in axes):
            return False
    sizes = {block for _offset, block in blocks}
    aligned = (
        begin % extent == 0
        for offset, block in blocks
        for begin, extent in zip(offset, block, strict=True)
    )
    if len(sizes) == 1 and all(aligned):
        return True  # cells of one grid, and no two are the same
    return not any(
        _overlap(one, size, other, extent)[0] is not None
        for (one, size), (other, extent) in combinations(blocks, 2)
    )


def _sum(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _overlap(
    offset: Sequence[int], shape: Sequence[int], wanted: Sequence[int], size: Sequence[int]
) -> tuple[Slices | None, Slices | None]:
    """Slices of what two blocks of one tensor share, within each of them; None if nothing."""
    there, here = [], []
    for start, length, begin, extent in zip(offset, shape, wanted, size, strict=True):
        first, last = max(start, begin), min(start + length, begin + extent)
        if first >= last:
            return None, None
        there.append(slice(first - start, last - start))
        here.append(slice(first - begin, last - begin))
    return tuple(there), tuple(here)
