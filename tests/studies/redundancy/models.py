"""Small models that are walked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch
from keel_megatron.layout.stages import own_partition
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.studies.redundancy.stage import Stage
from keel_megatron.studies.redundancy.units import Removal, Unit, count
from keel_megatron.studies.redundancy.walk import Found, Walk
from tests.settings import small_config

SEQUENCES, LENGTH, VOCABULARY = 6, 16, 320


def run_config(**overrides: Any) -> RunConfig:
    """A run of 8 sub-layers whose weights are so large that each of them matters."""
    return small_config(
        **{
            "model__blocks": 4,
            "model__hidden_size": 32,
            "model__ffn_hidden_size": 48,
            "model__num_query_groups": 2,
            "model__init_std": 0.1,
            "data__seq_length": LENGTH,
            "data__vocab_size": VOCABULARY,
            **overrides,
        }
    )


def model_of(config: RunConfig, runtime: Runtime) -> nn.Module:
    """This stage's chunk, with norm weights away from 1."""
    from keel_megatron.model.language_model import build_model

    (chunk,) = build_model(config, runtime)
    for number, layer in enumerate(chunk.decoder.layers, 10 * runtime.pipeline_rank):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.dim() == 1:
                    parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return chunk


def batch_of(seed: int = 0, **rest: Any) -> Batch:
    """Random sequences."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), **rest)


def walk_of(
    chunk: nn.Module,
    config: RunConfig,
    runtime: Runtime,
    unit: Unit = "sub-layer",
    removal: Removal = "sub-layer",
    batch_size: int = 20,
) -> Walk:
    chunks = own_partition(config, runtime).layout.chunks
    stages = [range(2 * c.first_block, 2 * (c.first_block + c.blocks)) for c in chunks]
    stage = Stage(chunk, config.model, removal)
    return Walk(stage, stages, unit, batch_size, config.model.hidden_size, runtime)


def found_by(walk: Walk, batch: Batch, units: list[int] | None = None) -> dict[int, Found]:
    """The results of a walk, by unit."""
    found: dict[int, Found] = {}

    def take(one: Found) -> None:
        assert one.unit not in found
        found[one.unit] = one

    depth = sum(map(len, walk._stages))
    everything = list(range(count(depth, walk._unit)))
    part = batch.only(tokens=walk._is_first, labels=walk.is_last)
    walk.run(part, (SEQUENCES, LENGTH), everything if units is None else units, take)
    return found


def split_walk(tensor: int, pipeline: int, unit: Unit) -> tuple[dict[int, Found], int]:
    """The results on this rank of a layout, and its passes."""
    config = run_config(parallel__tensor=tensor, parallel__pipeline=pipeline)
    with start(config.parallel, config.training) as runtime:
        walk = walk_of(build_equal(config, runtime), config, runtime, unit)
        return found_by(walk, batch_of()), walk.stage.passes


def build_equal(config: RunConfig, runtime: Runtime) -> nn.Module:
    """A chunk of the same model at every layout: norm weights are 1."""
    from keel_megatron.model.language_model import build_model

    (chunk,) = build_model(config, runtime)
    return chunk
