"""Keys and values of the tokens that a model has seen, for every block of a stage."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Static memory for the keys and values of up to `capacity` columns.

    Prompts of unequal length are padded on the left: a column is the same step of every sequence.

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
        self.length = 0
        self._hidden: Tensor | None = None
        if any(padding):
            columns = torch.arange(capacity, device=device)
            self._hidden = columns < torch.tensor(padding, device=device)[:, None]
        self._dtype = dtype

    def bias(self, columns: int) -> Tensor | None:
        """What is added to the scores of the next columns' queries, 0 or -inf.

        Of one column [b, 1, 1, length + 1], None without padding. Of several [b, 1, columns,
        columns]; they must be the first ones, and without padding it is None too: causal.

        Args:
            columns: how many.
        """
        if self._hidden is None:
            return None
        allowed = ~self._hidden[:, None, None, : self.length + columns]
        if columns > 1:
            allowed = allowed.expand(-1, -1, columns, -1).tril()
            # A softmax over nothing is not a number: padding sees itself.
            allowed = allowed | torch.eye(columns, dtype=torch.bool, device=allowed.device)
        bias = torch.zeros(allowed.shape, dtype=self._dtype, device=allowed.device)
        return bias.masked_fill_(~allowed, -torch.inf)
