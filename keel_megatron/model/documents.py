"""`data.document_masks`: which tokens of a packed sequence attend to each other.

Attention within a document is softmax(Q K^T / sqrt(d)) V over the document's earlier tokens. The
rotary embedding makes a score depend on the difference of two positions alone, so positions are
not reset at a document's start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch, on its device.

    They go through Megatron-core's blocks as `attention_bias`, which reaches recomputed blocks too.

    Args:
        numbers: number of the token's document within its sequence, int32 [b, s].
        borders: cumulative lengths of all documents, sequence after sequence, int32
            [documents + 1]; None: only `bias` is used.
        longest: length of the longest document, where there are borders.
    """

    numbers: Tensor
    borders: Tensor | None = None
    longest: int = 0
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """0 where a query may attend to a key, else -inf: [b, 1, s, s], made once."""
        if dtype not in self._biases:
            together = same_document(self.numbers, self.numbers).tril_()
            bias = torch.zeros(together.shape, dtype=dtype, device=together.device)
            self._biases[dtype] = bias.masked_fill_(together.logical_not_(), -torch.inf)
        return self._biases[dtype]

    def are_packed(self, query: Tensor) -> bool:
        """Whether attention of a query [s, b, heads, d] runs over `borders`, in one kernel."""
        fits = query.size(-1) % 8 == 0 and query.size(-1) <= 256
        on_cuda = query.is_cuda and query.dtype == torch.bfloat16
        return self.borders is not None and on_cuda and fits


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether query and key are of one document, bool [b, 1, queries, keys].

    Args:
        queries: documents' numbers, [b, queries].
        keys: the same of the keys, [b, keys].
    """
    return queries[:, None, :, None] == keys[:, None, None, :]
