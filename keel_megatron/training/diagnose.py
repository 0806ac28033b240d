"""Diagnosis of an anomalous step by depth; computed only when the guard finds an anomaly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keel_megatron.data.batches import Batch
from keel_megatron.engines.base import Engine

# Rows of a depth: the embedding, the blocks from 1 on, and the final norm with the output head.
_EMBEDDING = 0


def describe(engine: Engine, batches: Sequence[Batch], loss: float) -> str:
    """One line that names the affected depth; collective, the same on every rank.

    Call it after the backward pass and before the update. If the loss is not finite, the
    forward pass is repeated without dropout, to find the first block after which the stream is not
    finite.

    Args:
        engine: holds the step's gradients.
        batches: the step's micro-batches on this replica.
        loss: the step's loss.
    """
    stages = _stages(engine)
    rows = len(stages)
    found = []
    if not math.isfinite(loss):
        bad = _non_finite_streams(engine, batches, rows)
        first = next((row for row, count in enumerate(bad) if count), None)
        found.append(
            "a second forward pass is finite: the fault was transient"
            if first is None
            else f"the stream is not finite from {_name(first, stages)} on"
        )
    norms = gradient_norms(engine, rows)
    broken = [row for row, norm in enumerate(norms) if not math.isfinite(norm)]
    if broken:
        # The backward pass begins at the head.
        found.append(
            f"gradients are not finite in {len(broken)} of {rows} places, in the backward pass "
            f"first in {_name(broken[-1], stages)}"
        )
    else:
        largest = max(range(rows), key=lambda row: norms[row])
        typical = sorted(norms)[rows // 2]
        found.append(
            f"the largest gradient norm, {norms[largest]:.4g}, is that of "
            f"{_name(largest, stages)} (median of all places: {typical:.4g})"
        )
    return "; ".join(found)


def gradient_norms(engine: Engine, rows: int) -> list[float]:
    """L2 norm of the averaged gradient of the embedding, of each block and of the head.

    Each rank adds the squares of the elements that it owns.
    """
    squares = torch.zeros(rows, dtype=torch.float64, device=engine.runtime.device)
    for row, parameter in _parameters(engine.chunks, rows):
        gradient = engine.own_gradient(parameter)
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            squares[row] += norm.square().to(squares.device)
    dist.all_reduce(squares)
    return [math.sqrt(value) if value >= 0 else math.nan for value in squares.tolist()]


def _parameters(chunks: list[nn.Module], rows: int) -> Iterator[tuple[int, nn.Parameter]]:
    """(row, parameter) of this rank's chunks."""
    for chunk in chunks:
        layers = {id(p): row for row, layer in _layers([chunk]) for p in layer.parameters()}
        for name, parameter in chunk.named_parameters():
            elsewhere = _EMBEDDING if name.startswith("embedding") else rows - 1
            yield layers.get(id(parameter), elsewhere), parameter


def _layers(chunks: list[nn.Module]) -> Iterator[tuple[int, Any]]:
    """(number of the block from 1, its layer) of this rank's chunks."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            yield int(layer.layer_number), layer


def _stages(engine: Engine) -> list[int]:
    """The pipeline stage of every row."""
    runtime, rows = engine.runtime, engine.config.model.blocks + 2
    stages = torch.zeros(rows, dtype=torch.int64, device=runtime.device)
    for row, _parameter in _parameters(engine.chunks, rows):
        stages[row] = runtime.pipeline_rank
    dist.all_reduce(stages, op=dist.ReduceOp.MAX)
    return stages.tolist()


def _non_finite_streams(engine: Engine, batches: Sequence[Batch], rows: int) -> list[float]:
    """How often the stream was not finite after each block, in a forward pass of the batches."""
    counts = torch.zeros(rows, device=engine.runtime.device)
    with _watching(engine.chunks, counts):
        engine.validate(batches, len(batches))
    dist.all_reduce(counts)
    return counts.tolist()


@contextmanager
def _watching(chunks: list[nn.Module], counts: Tensor) -> Iterator[None]:
    def look(row: int, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        counts[row] += (~torch.isfinite(stream)).any()

    hooks = [layer.register_forward_hook(partial(look, row)) for row, layer in _layers(chunks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _name(row: int, stages: list[int]) -> str:
    if row == _EMBEDDING:
        place = "the embedding"
    elif row == len(stages) - 1:
        place = "the final norm and output head"
    else:
        place = f"block {row}"
    return f"{place} (stage {stages[row]})"
