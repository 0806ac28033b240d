"""The DeepSpeed engine's state under the names of the Megatron engine's checkpoints, and back.

Masters and moments have the same names and shapes (`checkpoint.parameters`), so either engine
resumes from the other's checkpoint. Unlike there, saving gathers: ZeRO's parameters are collected
one at a time, each on the replica that writes it, so a rank never holds a second model. Loading
does not: a rank reads the elements of its own shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.checkpoint.parameters import MASTER, STATES, Placed, updates
from keel_megatron.checkpoint.sharding import Piece, Reader, TensorReader, ToSave
from keel_megatron.engines.deepspeed.zero_shards import ZeroShards


class ZeroState:
    """A `checkpoint.state.Trained`.

    Args:
        parameters: the model's, placed before ZeRO sharded them.
        shards: holds their state.
        group: the data-parallel process group.
    """

    def __init__(self, parameters: list[Placed], shards: ZeroShards, group: Any) -> None:
        self._parameters = parameters
        self._shards = shards
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def steps(self) -> int:
        """Updates that the optimizer has counted."""
        return self._shards.steps

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """All that this rank holds of masters and moments, by state and parameter."""
        for one in self._parameters:
            for name in STATES:
                shard = self._shards.state(one.parameter, name)
                if shard is not None:
                    yield f"{name} {one.name}", shard.values

    def to_save(self, *, copy: bool) -> ToSave:
        """As `Trained.to_save`; every replica saves its share of the parameters, always copied."""
        del copy
        pieces: list[Piece] = []
        for number, one in enumerate(self._parameters):
            owner = number % self._size
            for name in STATES:
                shape = torch.Size([one.numel])
                whole = self._shards.collect(one.parameter, shape, name, owner)
                if whole is not None and one.is_main:
                    pieces += one.pieces(name, whole.cpu())
        elements = sum(one.numel for one in self._parameters if one.is_main)
        expected = len(STATES) * elements if self._rank == 0 else 0
        return ToSave(pieces, {"optimizer": {"updates": self.steps}}, expected)

    def read(self, path: Path, index: dict[str, Any], common: dict[str, Any]) -> Any:
        """As `Trained.read`; this replica's shards are filled in place."""
        self.fill(Reader(path, index), masters_only=False)
        return updates(common)

    def fill(self, reader: TensorReader, *, masters_only: bool) -> None:
        """As `Trained.fill`."""
        for one in self._parameters:
            for name in (MASTER,) if masters_only else STATES:
                shard = self._shards.state(one.parameter, name)
                if shard is not None:
                    one.read(reader, name, shard.values, shard.start)

    def apply(self, loaded: Any) -> None:
        """As `Trained.apply`."""
        self._shards.set_steps(loaded)
        self._shards.spread_masters()
