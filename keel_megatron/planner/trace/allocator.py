"""What torch's CUDA caching allocator would reserve for a sequence of allocations.

Its rules (c10/cuda/CUDACachingAllocator.cpp, torch 2.9 to 2.13), of one stream: sizes are rounded
up to 512 bytes. Up to 1 MiB they come from the pool of small blocks, whose segments are 2 MiB;
larger ones from segments of 20 MiB below 10 MiB, and of their own size in whole 2 MiB from there.
The smallest free block that is large enough is taken, and split where 512 bytes (small) or more
than 1 MiB (large) would be left; freed neighbours are joined.

With expandable segments a pool is one range of addresses that grows at its end, by whole pages of
2 MiB (small) or 20 MiB, and every block may be split.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 1 << 20
_ROUND, _SMALL, _SMALL_SEGMENT, _LARGE_SEGMENT = 512, MIB, 2 * MIB, 20 * MIB
_OWN_SEGMENT = 10 * MIB


@dataclass
class _Block:
    size: int
    free: bool
    before: int | None
    after: int | None


class _Pool:
    """Blocks by their address; segments never touch, unless they are one that expands."""

    def __init__(self, small: bool, expandable: bool) -> None:
        self.small, self.expandable = small, expandable
        self.blocks: dict[int, _Block] = {}
        self.free: list[tuple[int, int]] = []
        """(size, address), sorted."""
        self.end = 0
        self.last: int | None = None
        """The block at the end of the range that expands."""
        self.reserved = 0

    def take(self, size: int) -> int:
        """The address of a block of this rounded size."""
        address = self._found(size)
        if address is None:
            address = self._expand(size) if self.expandable else self._segment(size)
        block = self.blocks[address]
        block.free = False
        least = _ROUND if self.small or self.expandable else _SMALL + 1
        if block.size - size >= least:
            self._split(address, size)
        return address

    def give(self, address: int) -> None:
        """Free a block and join it with free neighbours."""
        block = self.blocks[address]
        block.free = True
        if block.before is not None and self.blocks[block.before].free:
            self._unlist(block.before)
            address = self._join(block.before, address)
        after = self.blocks[address].after
        if after is not None and self.blocks[after].free:
            self._unlist(after)
            address = self._join(address, after)
        insort(self.free, (self.blocks[address].size, address))

    def _found(self, size: int) -> int | None:
        place = bisect_left(self.free, (size, -1))
        # The block that can expand counts as larger than all others: it is taken last.
        if self.expandable and place + 1 < len(self.free) and self.free[place][1] == self.last:
            place += 1
        if place == len(self.free):
            return None
        return self.free.pop(place)[1]

    def _segment(self, size: int) -> int:
        length = _SMALL_SEGMENT if self.small else _LARGE_SEGMENT
        if size >= _OWN_SEGMENT:
            length = -(-size // _SMALL_SEGMENT) * _SMALL_SEGMENT
        address = self.end
        self.end += length + MIB
        self.reserved += length
        self.blocks[address] = _Block(length, True, None, None)
        return address

    def _expand(self, size: int) -> int:
        """The range's last block if it is free, or a new one there, made large enough."""
        page = _SMALL_SEGMENT if self.small else _LARGE_SEGMENT
        last = None if self.last is None else self.blocks[self.last]
        there = last.size if last is not None and last.free else 0
        grown = -(-(size - there) // page) * page
        self.reserved += grown
        if there and last is not None and self.last is not None:
            self._unlist(self.last)
            last.size += grown
        else:
            self.blocks[self.end] = _Block(grown, True, self.last, None)
            if last is not None:
                last.after = self.end
            self.last = self.end
        self.end += grown
        assert self.last is not None
        return self.last

    def _split(self, address: int, size: int) -> None:
        block = self.blocks[address]
        rest = address + size
        self.blocks[rest] = _Block(block.size - size, True, address, block.after)
        if block.after is not None:
            self.blocks[block.after].before = rest
        block.size, block.after = size, rest
        if self.last == address:
            self.last = rest
        insort(self.free, (self.blocks[rest].size, rest))

    def _unlist(self, address: int) -> None:
        self.free.pop(bisect_left(self.free, (self.blocks[address].size, address)))

    def _join(self, address: int, after: int) -> int:
        block, gone = self.blocks[address], self.blocks.pop(after)
        block.size += gone.size
        block.after, block.free = gone.after, True
        if gone.after is not None:
            self.blocks[gone.after].before = address
        if self.last == after:
            self.last = address
        return address


class CachingAllocator:
    """The allocator of one device and stream, whose memory has no limit."""

    def __init__(self, *, expandable: bool = False) -> None:
        self._pools = (_Pool(False, expandable), _Pool(True, expandable))
        self._where: dict[int, tuple[_Pool, int]] = {}

    @property
    def reserved(self) -> int:
        """Bytes taken from the device: they are given back only when it has none left."""
        return sum(pool.reserved for pool in self._pools)

    def malloc(self, key: int, size: int) -> None:
        """Allocate `size` bytes, to be freed by this key."""
        rounded = max(_ROUND, -(-size // _ROUND) * _ROUND)
        pool = self._pools[rounded <= _SMALL]
        self._where[key] = pool, pool.take(rounded)

    def free(self, key: int) -> None:
        """Free what was allocated under the key."""
        pool, address = self._where.pop(key)
        pool.give(address)
