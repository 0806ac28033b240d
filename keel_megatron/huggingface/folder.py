"""Writes the weights of a checkpoint as safetensors files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel_megatron.checkpoint.shard_file import Part, blocks
from keel_megatron.huggingface.naming import Fused

INDEX = "model.safetensors.index.json"
MAX_BYTES = 5_000_000_000
"""Size of a file above which the weights are split, as in transformers."""
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

Read = Callable[[str, tuple[int, ...]], Tensor]
"""(name, shape) to a fp32 parameter (`checkpoint.weights.Weights.read`)."""


@dataclass
class _Last:
    """The parts of the parameter that was read last, so that each is read once."""

    fused: Fused | None = None
    parts: dict[str, Tensor] | None = None


def write_weights(
    folder: Path,
    parameters: Iterable[Fused],
    read: Read,
    dtype: torch.dtype,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> int:
    """Write the weights, one parameter in memory at a time.

    Norm weights stay fp32 whatever `dtype` is: rounded, they would compound over depth.

    Args:
        folder: an existing folder.
        parameters: what to write.
        read: reads a parameter of the checkpoint.
        dtype: torch.float32 or torch.bfloat16.
        max_bytes: begin another file before one gets larger.
        progress: called with the bytes of each tensor written.

    Returns:
        Bytes of all weights.

    Raises:
        OSError: a file cannot be written.
        UserError: a parameter cannot be read.
    """
    files = list(_files(_parts(parameters, read, dtype, progress), max_bytes))
    weight_map = {}
    for number, parts in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with (folder / name).open("wb") as stream:
            for block in blocks(parts, {"format": "pt"}):
                stream.write(block)
        weight_map.update({part.name: name for part in parts})
    total = sum(part.bytes for parts in files for part in parts)
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    return total


def _parts(
    parameters: Iterable[Fused], read: Read, dtype: torch.dtype, progress: Callable[[int], None]
) -> Iterator[Part]:
    last = _Last()

    def data(fused: Fused, name: str, kind: torch.dtype) -> Any:
        if last.fused is not fused:
            values = fused.split(read(fused.name, fused.shape))
            last.fused, last.parts = fused, dict(zip(fused.parts, values, strict=True))
        assert last.parts is not None
        content = last.parts.pop(name).to(kind).contiguous().view(-1).view(torch.uint8).numpy()
        progress(content.nbytes)
        return content

    for fused in parameters:
        kind = torch.float32 if len(fused.shape) == 1 else dtype
        for name, shape in fused.parts.items():
            yield Part(name, _TYPES[kind], shape, partial(data, fused, name, kind))


def _files(parts: Iterable[Part], max_bytes: int) -> Iterator[list[Part]]:
    held: list[Part] = []
    size = 0
    for part in parts:
        if held and size + part.bytes > max_bytes:
            yield held
            held, size = [], 0
        held.append(part)
        size += part.bytes
    yield held
