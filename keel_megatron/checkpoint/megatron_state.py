"""The Megatron engine's state: every rank's own slices of masters and moments, as they lie there.

No rank gathers anything: with the distributed optimizer each replica writes the flat ranges that it
owns, and without it an even share, so all write 12 bytes x the stage's parameters / replicas. Each
of Muon's matrices is written by the replica that updates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from keel_megatron.checkpoint.optimizer_shards import OptimizerShards, WholeMatrices
from keel_megatron.checkpoint.parameters import MASTER, Placed, placed, updates
from keel_megatron.checkpoint.places import even_ranges
from keel_megatron.checkpoint.sharding import Piece, Reader, TensorReader, ToSave
from keel_megatron.checkpoint.staging import Staging


class MegatronState:
    """A `checkpoint.state.Trained`.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron-core's, over them.
        muon: what Muon updates of them.
    """

    def __init__(
        self, chunks: list[nn.Module], optimizer: Any, muon: WholeMatrices | None = None
    ) -> None:
        self._chunks = chunks
        self.shards = OptimizerShards(optimizer, muon)
        self._staging: Staging | None = None  # from the first save that copies on

    def to_save(self, *, copy: bool) -> ToSave:
        """As `Trained.to_save`, but not collective. From a GPU it always copies.

        The thread that writes would else copy tensor by tensor, through pageable memory.
        """
        pieces = [
            piece
            for one, start, states in self._shares()
            if one.is_main
            for name, values in states.items()
            for piece in one.pieces(name, values, start)
        ]
        common = {"optimizer": {"updates": self.shards.updates}}
        expected = 0
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            expected = sum(
                len(self.shards.names(one.parameter)) * one.numel
                for one in self._placed
                if one.is_main
            )
        device = pieces[0].values.device if pieces else torch.device("cpu")
        if not copy and device.type == "cpu":
            return ToSave(pieces, common, expected)
        if self._staging is None:
            self._staging = Staging(device)
        copies = self._staging.copy([piece.values for piece in pieces])
        copied = [Piece(p.place, values) for p, values in zip(pieces, copies, strict=True)]
        return ToSave(copied, common, expected, self._staging.ready)

    def before_update(self) -> None:
        """Keep the update behind the copies of a save; called before masters or moments change."""
        if self._staging is not None:
            self._staging.wait()

    def read(self, path: Path, index: dict[str, Any], common: dict[str, Any]) -> Any:
        """As `Trained.read`; masters and moments are filled in place."""
        self.fill(Reader(path, index), masters_only=False)
        return updates(common)

    def fill(self, reader: TensorReader, *, masters_only: bool) -> None:
        """As `Trained.fill`."""
        self.before_update()
        for one in self._placed:
            owned = self.shards.owned(one.parameter)
            if owned is None:
                continue
            for name, values in self.shards.states(one.parameter).items():
                if name == MASTER or not masters_only:
                    one.read(reader, name, values, owned.start)

    def apply(self, loaded: Any) -> None:
        """As `Trained.apply`."""
        self.shards.set_updates(loaded)
        self.shards.spread_masters([one.parameter for one in self._placed])

    def _shares(self) -> Iterator[tuple[Placed, int, dict[str, Tensor]]]:
        """What this replica writes of each parameter: the elements from a start on."""
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        alike = [one for one in self._placed if self.shards.is_replicated(one.parameter)]
        shares = even_ranges([one.numel for one in alike], rank, size)
        for one, (start, stop) in zip(alike, shares, strict=True):
            if start < stop:
                states = self.shards.states(one.parameter)
                yield one, start, {name: value[start:stop] for name, value in states.items()}
        for one in self._placed:
            owned = self.shards.owned(one.parameter)
            if owned is not None and not self.shards.is_replicated(one.parameter):
                yield one, owned.start, self.shards.states(one.parameter)

    @cached_property
    def _placed(self) -> list[Placed]:
        return [one for chunk in self._chunks for one in placed(chunk)]


def load_masters(reader: TensorReader, chunks: list[nn.Module]) -> None:
    """Fill the weights of a model without optimizer from the masters, cast to their types.

    Raises:
        DamagedError: something is missing or not as it should be.
    """
    for chunk in chunks:
        for one in placed(chunk):
            master = torch.empty(one.numel, dtype=torch.float32)
            one.read(reader, MASTER, master)
            one.parameter.data.copy_(master.view(one.parameter.shape))
