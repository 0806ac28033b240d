"""The Megatron engine's weights and optimizer, as Megatron-core shards them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from torch import nn

from keel_megatron.checkpoint.optimizer_state import load_optimizer, sharded_optimizer_state
from keel_megatron.checkpoint.sharding import load_state


class MegatronState:
    """A `checkpoint.state.Trained`.

    Args:
        chunks: this rank's model chunks.
        optimizer: Megatron-core's, over them; None = the weights alone.
    """

    copies = False

    def __init__(self, chunks: list[nn.Module], optimizer: Any) -> None:
        self._chunks = chunks
        self._optimizer = optimizer

    def to_save(self) -> dict[str, Any]:
        """The tensors with their place in the global ones."""
        return self._sharded(is_loading=False)

    def read(self, path: Path, index: dict[str, Any], common: dict[str, Any]) -> Any:
        """As `Trained.read`; tensors that exist are filled in place."""
        return load_state(path, self._sharded(is_loading=True), index, common)

    def apply(self, loaded: Any) -> None:
        """As `Trained.apply`."""
        for number, chunk in enumerate(self._chunks):
            chunk.load_state_dict(loaded[_chunk_key(number)])
        if self._optimizer is not None:
            load_optimizer(self._optimizer, loaded["optimizer"])

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = content_metadata()
        state: dict[str, Any] = {
            _chunk_key(number): chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
            for number, chunk in enumerate(self._chunks)
        }
        if self._optimizer is not None:
            models = state[_chunk_key(0)] if len(self._chunks) == 1 else dict(state)
            state["optimizer"] = sharded_optimizer_state(
                self._optimizer, models, metadata, is_loading
            )
        return state


def content_metadata() -> dict[str, Any]:
    """How Megatron-core shards what a checkpoint holds."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _chunk_key(number: int) -> str:
    return f"model{number}"
