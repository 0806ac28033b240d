"""Keys and values of the tokens that a model has seen, for every block of a stage."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Columns(Protocol):
    """The next columns of a cache: where keys and values go, and what their queries see."""

    def rotation(self, table: Tensor, columns: int) -> tuple[Tensor, ...]:
        """Their part of the rotary table [2, capacity, ...]: cos and signed sin [columns, ...]."""

    def bias(self, columns: int) -> Tensor | None:
        """What is added to the scores of their queries, 0 or -inf; None: nothing.

        Of one column [b, 1, 1, columns that `append` returns]. Of several, which must be the first
        ones, [b, 1, columns, columns]; None is causal then.
        """

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values [columns, b, groups, d] of a block.

        Returns:
            All keys and values for the columns' queries [b, groups, ..., d].
        """


class KeyValueCache:
    """Static memory for the keys and values of up to `capacity` columns.

    Prompts of unequal length are padded on the left: a column is the same step of every sequence.
    As `Columns` it is the next ones, of which `length` is moved on by the caller.

    Args:
        blocks: blocks of this stage.
        padding: columns of padding in front of each sequence, [b].
        groups: key/value heads on this rank.
        capacity: columns.
        head_dim: d.
        dtype: of keys and values.
        device: where they are.

    Attributes:
        keys: of each block, [b, groups, capacity, d].
        values: of each block, [b, groups, capacity, d].
        length: columns that are filled.
        hidden: which columns are padding, [b, capacity]; None without padding.
    """

    def __init__(
        self,
        blocks: int,
        padding: list[int],
        groups: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Attention multiplies hidden columns by 0: they must be finite.
        shape = (2, blocks, len(padding), groups, capacity, head_dim)
        self.keys, self.values = (
            list(part) for part in torch.zeros(shape, dtype=dtype, device=device)
        )
        self.length, self.capacity, self.batch = 0, capacity, len(padding)
        self.dtype, self.device = dtype, device
        self.hidden: Tensor | None = None
        if any(padding):
            columns = torch.arange(capacity, device=device)
            self.hidden = columns < torch.tensor(padding, device=device)[:, None]

    def rotation(self, table: Tensor, columns: int) -> tuple[Tensor, ...]:
        """See `Columns`."""
        return table[:, self.length : self.length + columns].unbind(0)

    def bias(self, columns: int) -> Tensor | None:
        """See `Columns`."""
        if self.hidden is None:
            return None
        allowed = ~self.hidden[:, None, None, : self.length + columns]
        if columns > 1:
            allowed = allowed.expand(-1, -1, columns, -1).tril()
            # A softmax over nothing is not a number: padding sees itself.
            allowed = allowed | torch.eye(columns, dtype=torch.bool, device=allowed.device)
        return scores_bias(allowed, self.dtype)

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Columns`."""
        keys, values = self.keys[block], self.values[block]
        end = self.length + key.size(0)
        if key.size(0) == 1:
            keys[:, :, end - 1], values[:, :, end - 1] = key[0], value[0]
        else:
            keys[:, :, self.length : end] = key.permute(1, 2, 0, 3)
            values[:, :, self.length : end] = value.permute(1, 2, 0, 3)
        return keys[:, :, :end], values[:, :, :end]


class StaticColumn:
    """The next column of a cache, at a place that only the device knows.

    Shapes and addresses are the same for every place below `extent`, so what is computed with it
    can be captured once and replayed. Later columns are hidden.

    Args:
        cache: the cache.
        place: the column's number, [1], on the cache's device.
        extent: columns that attention reads.
    """

    def __init__(self, cache: KeyValueCache, place: Tensor, extent: int) -> None:
        self._cache, self._place, self._extent = cache, place, extent

    def rotation(self, table: Tensor, columns: int) -> tuple[Tensor, ...]:
        """See `Columns`."""
        assert columns == 1
        return table.index_select(1, self._place).unbind(0)

    def bias(self, columns: int) -> Tensor:
        """See `Columns`."""
        assert columns == 1
        cache = self._cache
        allowed = (torch.arange(self._extent, device=cache.device) <= self._place)[None]
        if cache.hidden is not None:
            allowed = allowed & ~cache.hidden[:, : self._extent]
        return scores_bias(allowed.expand(cache.batch, -1)[:, None, None], cache.dtype)

    def append(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Columns`."""
        keys, values = self._cache.keys[block], self._cache.values[block]
        keys.index_copy_(2, self._place, key.permute(1, 2, 0, 3))
        values.index_copy_(2, self._place, value.permute(1, 2, 0, 3))
        return keys[:, :, : self._extent], values[:, :, : self._extent]


def scores_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, -inf elsewhere."""
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, -torch.inf)
