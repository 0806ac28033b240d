"""The weights of a checkpoint, tensor by tensor, without a model or a process group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.json_codec import to_json
from keel_megatron.checkpoint.manifest import (
    INDEX,
    WEIGHTS_ONLY,
    DamagedError,
    read_json,
    shards_name,
)
from keel_megatron.checkpoint.parameters import MASTER, master_names
from keel_megatron.checkpoint.places import Place, whole
from keel_megatron.checkpoint.shard_file import Part, blocks
from keel_megatron.checkpoint.sharding import NotFiniteError, Reader, index, tensor_bytes
from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.versions import package_versions


class Weights:
    """Reads one fp32 weight at a time, from a checkpoint of any layout and engine.

    Args:
        path: folder of a checkpoint that was checked (`checkpoint/resume.py`).

    Raises:
        UserError: its index cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._index: dict[str, Any] = read_json(path / INDEX)
        except DamagedError as error:
            raise UserError(f"{path} cannot be loaded: {error}") from None
        self._reader = Reader(path, self._index)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter's fp32 master, whole.

        Args:
            name: its name in every checkpoint, such as `decoder.layers.0.mlp.linear_fc1.weight`.
            shape: its global shape.

        Raises:
            UserError: it is missing, or has another shape.
        """
        target = torch.empty(shape, dtype=torch.float32)
        names = master_names(name)
        try:
            self._reader.fill(whole(f"optimizer.state.{MASTER}.{name}", shape), target, names)
        except DamagedError as error:
            raise UserError(f"{self._path} cannot be loaded: {error}") from None
        return target


@dataclass(frozen=True)
class Weight:
    """A weight to write."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Its fp32 values; called when they are written."""


def write_weights(
    run_folder: Path,
    config: RunConfig,
    weights: Iterable[Weight],
    copied: Mapping[str, bytes],
    origin: dict[str, Any],
) -> Path:
    """Write a checkpoint of step 0 that has weights and no optimizer state.

    Args:
        run_folder: the run's folder.
        config: the run.
        weights: all parameters of its model, by their names in checkpoints; one is in memory at a
            time.
        copied: content of the tokenizer and of the chat template, by name.
        origin: where the weights are from; kept in state.json.

    Returns:
        The checkpoint.

    Raises:
        OSError: it cannot be written.
        UserError: a weight is not finite.
    """
    weights = list(weights)
    place = folder.begin(run_folder, 0)
    parts = [Part(_master(w).name, "F32", w.shape, partial(_content, w)) for w in weights]
    files, shards = {}, shards_name(0)
    try:
        stream = blocks(parts, {"format": "pt", "rank_state": "{}"})
        files[shards] = manifest.write_checked(place / shards, stream)
    except NotFiniteError as error:
        raise UserError(f"{error} is not finite: such weights cannot be used") from None
    for name, content in {manifest.CONFIG: dump_config(config).encode(), **copied}.items():
        files[name] = manifest.write_checked(place / name, [content])
    for name, value in (
        (manifest.STATE, _state(origin)),
        (manifest.INDEX, index([(shards, [(_master(w), "F32") for w in weights])])),
        (manifest.BACKEND, manifest.BACKEND_MARK),
    ):
        files[name] = manifest.write_json(place / name, value)
    manifest.write_manifest(place, 0, files)
    return folder.publish(place)


def _master(weight: Weight) -> Place:
    return whole(f"optimizer.state.{MASTER}.{weight.name}", weight.shape)


def _content(weight: Weight) -> Any:
    return tensor_bytes(weight.name, weight.read())


def _state(origin: dict[str, Any]) -> dict[str, Any]:
    """What state.json holds of a run that has not begun."""
    return {
        "step": 0,
        "consumed_samples": 0,
        WEIGHTS_ONLY: True,
        "origin": origin,
        "layout": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1},
        "device": "cpu",
        "packages": package_versions(),
        "data": {},
        "extras": to_json({}),
        "common": to_json({}),
    }
