"""The weights of a checkpoint, tensor by tensor, without a model or a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel_megatron.checkpoint.manifest import INDEX, DamagedError, read_json
from keel_megatron.checkpoint.parameters import MASTER, master_names
from keel_megatron.checkpoint.places import whole
from keel_megatron.checkpoint.sharding import Reader
from keel_megatron.errors import UserError


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
