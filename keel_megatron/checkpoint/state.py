"""Saves the whole state of a run as a snapshot, and restores it.

A checkpoint contains the optimizer (fp32 masters, of which the weights are casts, and moments), the
random generators of every rank, the position in the data, the state of other parts of the run, the
identity of the data, the resolved configuration and the versions of the packages. The schedule has
no state: its position is the step. Tensors have names and places that do not depend on the layout
(`parameters`), so a run may resume at any layout.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import nn

from keel_megatron.checkpoint.json_codec import from_json, to_json
from keel_megatron.checkpoint.manifest import (
    INDEX,
    STATE,
    DamagedError,
    open_shards,
    read_json,
    shards_name,
)
from keel_megatron.checkpoint.megatron_state import load_masters
from keel_megatron.checkpoint.places import Place
from keel_megatron.checkpoint.shard_file import Part
from keel_megatron.checkpoint.sharding import Reader, TensorReader, ToSave, parts
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.seeds import seed_dropout
from keel_megatron.runtime.versions import package_versions


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences seen; the position in the data."""


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes of a checkpoint."""

    position: Position
    parts: list[Part]
    places: list[tuple[Place, str]]
    """Where each part belongs, and its type."""
    expected: int
    """Elements in all of them; counted on one replica (`sharding.ToSave`)."""
    rank_state: str
    """JSON of this rank's generators."""
    run_state: dict[str, Any]
    """What state.json will hold; rank 0's is written."""

    @property
    def bytes(self) -> int:
        """About what this rank's file and its part of the index will take."""
        names = sum(512 + 2 * len(part.name) for part in self.parts)
        return sum(part.bytes for part in self.parts) + names + len(self.rank_state) + 4096


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds beside the tensors and generators that were restored."""

    position: Position
    extras: dict[str, Any] = field(default_factory=dict)
    """The state of other parts, by name, as it was given to `snapshot`."""


class Trained(Protocol):
    """The weights and the optimizer's state of an engine, under layout-independent names.

    Every engine uses identical names and shapes (docs/design.md), so that each resumes from
    another's checkpoint.
    """

    def to_save(self, *, copy: bool) -> ToSave:
        """What this rank writes; collective over all ranks.

        Args:
            copy: take the values now, in host memory, which the next call may use again; else
                they must not change before they are written.
        """

    def read(self, path: Path, index: dict[str, Any], common: dict[str, Any]) -> Any:
        """Read this rank's part of a checkpoint, and see that it is all there.

        Raises:
            DamagedError: after all collectives, if something is missing or not as it should be.
        """

    def fill(self, reader: TensorReader, *, masters_only: bool) -> None:
        """Read the masters, and unless `masters_only` the moments; not collective.

        Raises:
            DamagedError: as `read`.
        """

    def apply(self, loaded: Any) -> None:
        """Restore what `read` returned, once every rank has it; collective over all ranks.

        After `fill`: a count of updates, 0 for an optimizer that starts anew.
        """


def snapshot(
    config: RunConfig,
    runtime: Runtime,
    trained: Trained,
    position: Position,
    *,
    extras: dict[str, Any],
    data: dict[str, Any],
    copy: bool,
) -> Snapshot:
    """The run's state at `position`; collective over all ranks.

    Args:
        config: the run.
        runtime: this rank's place.
        trained: its engine's state.
        position: steps done and samples seen.
        extras: state of other parts by name, the same on every rank: numbers, text, None, lists,
            tuples, dicts, tensors and arrays.
        data: what the run is trained on (`data.dataset.Dataset.identity`).
        copy: take the values now; else they must not change before they are written.
    """
    saved = trained.to_save(copy=copy)
    found = parts(saved)
    places = [(piece.place, part.dtype) for piece, part in zip(saved.pieces, found, strict=True)]
    run_state = {
        "step": position.step,
        "consumed_samples": position.consumed_samples,
        "layout": _layout(config, runtime),
        "device": runtime.device.type,
        "packages": package_versions(),
        "data": data,
        "extras": to_json(extras),
        "common": to_json(saved.common),
    }
    rank_state = json.dumps(to_json(_rng_state(runtime)))
    return Snapshot(position, found, places, saved.expected, rank_state, run_state)


def load(
    path: Path,
    config: RunConfig,
    runtime: Runtime,
    trained: Trained,
) -> Loaded:
    """Restore weights, optimizer and generators from a checkpoint; collective over all ranks.

    On the layout that saved it every generator continues; on another one they start anew from
    the seed and the step.

    Raises:
        UserError: it does not fit this run, or is not as it was written; on every rank.
    """
    saved, problem = _read_run_state(path, config, runtime)
    _agree(path, runtime, problem)
    loaded = _read(path, runtime, lambda index: trained.read(path, index, saved["common"]))
    trained.apply(loaded)
    position = Position(saved["step"], saved["consumed_samples"])
    if saved["rng"] is not None:
        _restore_rng(saved["rng"])
    else:
        seed_dropout(
            config.training.seed, runtime.pipeline_rank, runtime.data_rank, step=position.step
        )
    return Loaded(position, saved["extras"])


def load_weights(path: Path, runtime: Runtime, chunks: list[nn.Module]) -> None:
    """Restore the weights alone, from a checkpoint of any layout; collective over all ranks.

    Raises:
        UserError: as `load`.
    """
    _read(path, runtime, lambda index: load_masters(Reader(path, index), chunks))


def load_weights_from(
    origin: Path, reader: TensorReader, runtime: Runtime, chunks: list[nn.Module]
) -> None:
    """As `load_weights`, from what is no checkpoint.

    Raises:
        UserError: a weight cannot be read; on every rank.
    """
    problem = None
    try:
        load_masters(reader, chunks)
    except DamagedError as error:
        problem = f"{origin} cannot be loaded: {error}"
    agree(runtime, problem)


def _read_run_state(
    path: Path, config: RunConfig, runtime: Runtime
) -> tuple[dict[str, Any], str | None]:
    """What is not sharded, and this rank's generators if they can continue; or what is wrong."""
    try:
        saved = read_json(path / STATE)
        saved["common"], saved["extras"] = from_json(saved["common"]), from_json(saved["extras"])
        saved["rng"] = None
        if saved["layout"] == _layout(config, runtime) and saved["device"] == runtime.device.type:
            file = open_shards(path / shards_name(runtime.rank))
            saved["rng"] = from_json(json.loads(file.metadata()["rank_state"]))
        return saved, None
    except DamagedError as error:
        return {}, str(error)
    except (TypeError, KeyError, ValueError):
        return {}, f"{STATE} is not the state of a run"


def _read(path: Path, runtime: Runtime, read: Callable[[dict[str, Any]], Any]) -> Any:
    loaded, problem = None, None
    try:
        loaded = read(read_json(path / INDEX))
    except DamagedError as error:
        problem = str(error)
    _agree(path, runtime, problem)
    return loaded


def _agree(path: Path, runtime: Runtime, problem: str | None) -> None:
    """Raise the first rank's problem with the run's own checkpoint on every rank."""
    remedy = "move that folder away and start again: the run resumes from the one before"
    agree(runtime, problem and f"{path} cannot be loaded: {problem}\n{remedy}")


def agree(runtime: Runtime, problem: str | None) -> None:
    """Raise the first rank's problem, if any rank has one; collective over all ranks.

    Raises:
        UserError: a rank has a problem; on every rank.
    """
    problems = runtime.gather(problem)

    def judge() -> None:
        first = next((text for text in problems if text is not None), None)
        if first is not None:
            raise UserError(first)

    runtime.from_main(judge)


def _layout(config: RunConfig, runtime: Runtime) -> dict[str, int]:
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "data": runtime.data_size,
    }


def _rng_state(runtime: Runtime) -> dict[str, Any]:
    """Every generator of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if runtime.device.type == "cuda" else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
