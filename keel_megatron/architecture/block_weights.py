"""The weight matrices of a block: how Megatron-core fuses them, and how a tensor group shards them.

A linear layer's weight is [output features, input features]. Two of a block's four are fused:

    linear_qkv  [query groups x (queries of a group + key + value), h]   sharded by query group
    linear_proj [h, heads x d]                                           sharded by column
    linear_fc1  [gate + up, h]                                           gate and up, each by row
    linear_fc2  [h, f]                                                   sharded by column

So a fused weight's rows are `runs` repetitions of its matrices' rows, and matrix i consists of
`rows[i]` rows of every run. Every shard of a fused weight is fused in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from keel_megatron.architecture.shape import ModelShape


@dataclass(frozen=True)
class BlockWeight:
    """A weight of a block, or one tensor rank's shard of it."""

    name: str
    """Of the linear layer."""
    runs: int
    """Repetitions of the matrices' rows: query groups in linear_qkv, otherwise 1."""
    rows: tuple[int, ...]
    """Rows of each matrix in a run."""
    columns: int
    sharded: str
    """What a tensor group divides: runs, rows or columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.runs * sum(self.rows), self.columns

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each matrix."""
        return tuple((self.runs * rows, self.columns) for rows in self.rows)

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        rows, columns = self.shape
        return rows * columns

    def shard(self, tensor: int) -> BlockWeight:
        """What one rank of a tensor group of that size holds; the size divides what it shards."""
        if self.sharded == "runs":
            return replace(self, runs=self.runs // tensor)
        if self.sharded == "rows":
            return replace(self, rows=tuple(rows // tensor for rows in self.rows))
        return replace(self, columns=self.columns // tensor)


def block_weights(model: ModelShape) -> tuple[BlockWeight, ...]:
    """The four weights of a block, whole, in the order of the forward pass."""
    h, d, f = model.hidden_size, model.head_dim, model.ffn_hidden_size
    heads, groups = model.num_attention_heads, model.query_groups
    return (
        BlockWeight("linear_qkv", groups, (heads // groups * d, d, d), h, "runs"),
        BlockWeight("linear_proj", 1, (h,), heads * d, "columns"),
        BlockWeight("linear_fc1", 1, (f, f), h, "rows"),
        BlockWeight("linear_fc2", 1, (h,), f, "columns"),
    )
