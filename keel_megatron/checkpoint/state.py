"""Save and load the whole state of a run with Megatron-core's sharded checkpoints.

A checkpoint holds the weights, the optimizer (fp32 masters and moments), the generators of every
rank, the position in the data and the resolved configuration. Weights and optimizer state are
stored under layout-independent names, so a run may go on at another layout.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.identity import CONFIG_FILE
from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.seeds import seed_dropout


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences seen; the position in the data."""


def save(
    config: RunConfig,
    runtime: Runtime,
    chunks: list[nn.Module],
    optimizer: Any,
    position: Position,
) -> Path:
    """Write the checkpoint of `position.step`; collective over all ranks.

    Written beside its place, synced and renamed, so that it exists whole or not at all.

    Returns:
        The checkpoint's folder.
    """
    run_folder = config.training.folder
    partial = folder.step_folder(run_folder, position.step).with_suffix(".partial")
    if runtime.is_main:
        folder.begin(run_folder, position.step)
    runtime.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["rng"] = _rng_state(runtime)
    state["run"] = {"layout": _layout(config, runtime), **asdict(position)}
    dist_checkpointing.save(state, str(partial), content_metadata=_content_metadata())
    if runtime.is_main:
        (partial / CONFIG_FILE).write_text(dump_config(config))
        folder.publish(partial)
        folder.prune(run_folder, config.checkpoint.keep)
    runtime.barrier()
    return folder.step_folder(run_folder, position.step)


def load(
    path: Path,
    config: RunConfig,
    runtime: Runtime,
    chunks: list[nn.Module],
    optimizer: Any,
) -> Position:
    """Restore weights, optimizer and generators from a checkpoint; collective over all ranks.

    On the layout that saved it every generator continues; on another one they start anew from
    the seed and the step.
    """
    run = dist_checkpointing.load_common_state_dict(str(path))["run"]
    same_layout = run["layout"] == _layout(config, runtime)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    if same_layout:
        state["rng"] = _rng_state(runtime)
    loaded = dist_checkpointing.load(state, str(path))
    _load_chunks(chunks, loaded)
    _load_optimizer(optimizer, loaded["optimizer"])
    position = Position(run["step"], run["consumed_samples"])
    if same_layout:
        _restore_rng(loaded["rng"])
    else:
        seed_dropout(
            config.training.seed, runtime.pipeline_rank, runtime.data_rank, step=position.step
        )
    return position


def load_weights(path: Path, chunks: list[nn.Module]) -> None:
    """Restore the weights alone, from a checkpoint of any layout."""
    state = _sharded_state(chunks, None, is_loading=True)
    _load_chunks(chunks, dist_checkpointing.load(state, str(path)))


def read_position(path: Path) -> Position:
    """How far a checkpoint's run had come."""
    run = dist_checkpointing.load_common_state_dict(str(path))["run"]
    return Position(run["step"], run["consumed_samples"])


def _content_metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _sharded_state(chunks: list[nn.Module], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """The model's (and optimizer's) tensors with their place in the global ones."""
    metadata = _content_metadata()
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {}
    for number, chunk in enumerate(chunks):
        state[_chunk_key(number)] = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
    if optimizer is not None:
        models = state[_chunk_key(0)] if len(chunks) == 1 else dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=metadata
        )
    return state


def _load_chunks(chunks: list[nn.Module], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_chunk_key(number)])


def _load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Restore the optimizer's groups and step, then masters and moments.

    Two traps of megatron-core 0.16.1 with torch's AdamW, which counts its steps per parameter: in
    one call it looks for `step` among the sharded tensors, where it is not, so it is set aside
    while those are loaded; and it gives all parameters one and the same counter, which each of them
    would then advance.
    """
    sharded = loaded.pop("param_state", None)
    optimizer.load_state_dict(loaded)
    if sharded is None:
        return
    (inner,) = optimizer.chained_optimizers
    states = inner.optimizer.state.values()
    steps = [state.pop("step") for state in states]
    inner.load_parameter_state_from_fully_reshardable(sharded)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step.clone()


def _chunk_key(number: int) -> str:
    return f"model{number}"


def _layout(config: RunConfig, runtime: Runtime) -> dict[str, int]:
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "data": runtime.data_size,
    }


def _rng_state(runtime: Runtime) -> ShardedObject:
    """Every generator of this rank, at the rank's place in a grid of all ranks."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if runtime.device.type == "cuda" else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject(
        "rng",
        state,
        (runtime.pipeline_size, runtime.tensor_size, runtime.data_size),
        (runtime.pipeline_rank, runtime.tensor_rank, runtime.data_rank),
        replica_id=0,
    )


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
