"""`data.document_masks`: which tokens of a packed sequence attend to each other.

Attention within a document is softmax(Q K^T / sqrt(d)) V over the document's earlier tokens. The
rotary embedding makes a score depend on the difference of two positions alone, so positions are
not reset at a document's start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """What the kernel for documents one after another is given."""

    borders: Tensor
    """Cumulative lengths, int32 [documents + 1]."""
    longest: int
    """Length that no document exceeds."""


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch, on its device.

    They go through Megatron-core's blocks as `attention_bias`, which reaches recomputed blocks too.

    Args:
        numbers: number of the token's document within its sequence, int32 [b, s].
        borders: cumulative lengths of all documents, sequence after sequence, int32
            [documents + 1]; None: attention runs with a mask in memory.
        longest: length of the longest document, where there are borders.
    """

    numbers: Tensor
    borders: Tensor | None = None
    longest: int = 0
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def within(self, x: Tensor, head_dim: int) -> Tensor | Packed:
        """What keeps attention within the documents: a bias of the scores, or their borders.

        A bias is 0 where a query may attend to a key and -inf elsewhere, [b, 1, s, s]; it is made
        once a micro-batch. docs/data.md compares it with a call for every document on a CPU.

        Args:
            x: a tensor of attention's type and device.
            head_dim: d.
        """
        if self.borders is not None and takes_borders(x.device, x.dtype, head_dim):
            return Packed(self.borders, self.longest)
        if x.dtype not in self._biases:
            together = same_document(self.numbers, self.numbers).tril_()
            bias = torch.zeros(together.shape, dtype=x.dtype, device=together.device)
            self._biases[x.dtype] = bias.masked_fill_(together.logical_not_(), -torch.inf)
        return self._biases[x.dtype]


def takes_borders(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel for documents one after another: FlashAttention's on CUDA."""
    fits = head_dim % 8 == 0 and head_dim <= 256
    return device.type == "cuda" and dtype == torch.bfloat16 and fits


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether query and key are of one document, bool [b, 1, queries, keys].

    Args:
        queries: documents' numbers, [b, queries].
        keys: the same of the keys, [b, keys].
    """
    return queries[:, None, :, None] == keys[:, None, None, :]
