"""Reads the weights of a Hugging Face folder, which may come from a stranger.

Only JSON and safetensors files are read, and no code of the folder is ever run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from keel_megatron.checkpoint.manifest import DamagedError, open_shards
from keel_megatron.checkpoint.parameters import MASTER_PREFIX
from keel_megatron.checkpoint.places import Place, whole
from keel_megatron.checkpoint.sharding import copy_shared
from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.errors import UserError
from keel_megatron.huggingface.folder import INDEX
from keel_megatron.huggingface.naming import Fused

WEIGHTS: Final = "model.safetensors"
_TYPES = ("F32", "BF16", "F16")
_UNUSED = "rotary_emb.inv_freq"
"""End of the name of a table that old folders list among the weights."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHOWN = 8


class SavedWeights:
    """The tensors of a folder's safetensors files.

    Args:
        folder: the folder.

    Raises:
        UserError: there are none, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in self._names():
            try:
                self._files[name] = open_shards(folder / name, "pt")
            except DamagedError as error:
                raise UserError(f"{folder}: {error}") from None
            for key in self._files[name].keys():  # noqa: SIM118 - it is no dict
                if self._file_of.setdefault(key, name) != name:
                    raise UserError(f"{folder}: {key} is in {self._file_of[key]} and in {name}")

    def _names(self) -> list[str]:
        """The files: one, or those that the index names."""
        if (self._folder / INDEX).is_file():
            files = read_json(self._folder, INDEX).get("weight_map")
            names = list(files.values()) if isinstance(files, dict) else []
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                    raise UserError(f"{self._folder}: {INDEX} names {name!r}, which is not a file")
            return sorted({*names})
        if (self._folder / WEIGHTS).is_file():
            return [WEIGHTS]
        pickles = sorted(self._folder.glob("*.bin")) + sorted(self._folder.glob("*.pt*"))
        why = f"; {pickles[0].name} is a pickle, which is never read" if pickles else ""
        raise UserError(f"{self._folder}: there is no {WEIGHTS} or {INDEX}{why}")

    @property
    def files(self) -> list[str]:
        """Names of the files with weights."""
        return list(self._files)

    @property
    def count(self) -> int:
        """How many tensors there are."""
        return len(self._file_of)

    def problems(self, parameters: Iterable[Fused], *, tied: bool) -> list[str]:
        """What does not fit the model: missing tensors, other ones, and their types."""
        found, left = [], dict(self._file_of)
        for fused in parameters:
            for name, shape in fused.parts.items():
                if left.pop(name, None) is None:
                    found.append(f"{name}: is missing")
                    continue
                values = self._slice(name)
                if tuple(values.get_shape()) != shape:
                    there = list(values.get_shape())
                    found.append(f"{name}: has the shape {there}, not {list(shape)}")
                elif values.get_dtype() not in _TYPES:
                    wanted = ", ".join(_TYPES)
                    found.append(f"{name}: is {values.get_dtype()}, not one of {wanted}")
        for name in left:
            is_copy = tied and name == _HEAD and self._is_embedding()
            if not (is_copy or name.endswith(_UNUSED)):
                found.append(f"{name}: is not supported: the model has no such weight")
        more = len(found) - _SHOWN
        return found[:_SHOWN] + ([f"and {more} more tensors"] if more > 0 else [])

    def read(self, fused: Fused) -> Tensor:
        """A parameter as checkpoints have it, fp32."""
        parts = tuple(self.tensor(name) for name in fused.parts)
        return fused.join(parts).view(fused.shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the folder, by its name there, fp32."""
        values = self._slice(name)
        tensor: Tensor = values[tuple(slice(0, size) for size in values.get_shape())]
        return tensor.to(torch.float32)

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)

    def _is_embedding(self) -> bool:
        """Whether the output layer's weights are the embedding's, as in a tied model."""
        return _EMBEDDING in self._file_of and torch.equal(
            self.tensor(_EMBEDDING), self.tensor(_HEAD)
        )


class FolderReader:
    """Reads pieces of the masters from a folder, as `checkpoint.sharding.Reader` from a checkpoint.

    Args:
        weights: the folder's, checked against the parameters.
        parameters: of the model.
    """

    def __init__(self, weights: SavedWeights, parameters: Iterable[Fused]) -> None:
        self._weights = weights
        self._parameters = {fused.name: fused for fused in parameters}

    @torch.no_grad()
    def fill(self, place: Place, target: Tensor, names: Sequence[str] = ()) -> None:
        """As `Reader.fill`; the whole parameter is in memory, under one name only.

        Raises:
            DamagedError: the folder has no such parameter.
        """
        del names
        key = place.key.removeprefix(MASTER_PREFIX)
        fused = self._parameters.get(key)
        if fused is None:
            raise DamagedError(f"it has no tensor {place.key}")
        values = self._weights.read(fused).contiguous().view(-1)
        host = torch.empty(place.numel, dtype=torch.float32)
        copy_shared(values, whole(place.key, fused.shape), host, place)
        target.detach().view(-1).copy_(host)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file of the folder.

    Raises:
        UserError: it is missing, too large, or no JSON object.
    """
    try:
        content = parse_json(read_small(folder / name, LARGE))
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{folder / name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} is not a JSON object")
    return content
