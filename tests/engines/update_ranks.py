"""What a rank of the tests of parameter groups runs: one update, seen parameter by parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.engines.base import StepResult
from keel_megatron.engines.build import build_engine
from keel_megatron.model.initialization import global_parameters
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import start
from tests.training.ranks import made_up_batches

Update = tuple[Tensor, Tensor, Tensor]
"""A parameter before a step, its gradient and the parameter after it, fp64."""


def first_updates(runs: list[dict[str, Any]], rate: float) -> list[dict[str, Update]]:
    """The first update of several runs, by the names of the whole model; on one rank."""
    return [_first_update(RunConfig.model_validate(sections), rate) for sections in runs]


def _first_update(config: RunConfig, rate: float) -> dict[str, Update]:
    with start(config.parallel, config.training) as runtime:
        engine: Any = build_engine(config, runtime, build_model(config, runtime))
        (chunk,) = engine.chunks
        named = list(global_parameters(chunk, tied=config.model.tie_embeddings))
        gradients: list[Tensor] = []

        def taken(_result: StepResult) -> bool:
            gradients.extend(copied(engine.own_gradient(parameter)) for _, parameter in named)
            return True

        before = [copied(engine.own_weight(parameter)) for _, parameter in named]
        batches = made_up_batches(config, runtime, 0)
        engine.train_step(batches, len(batches), rate, taken)
        after = [copied(engine.own_weight(parameter)) for _, parameter in named]
        names = [name for name, _ in named]
        triples = zip(before, gradients, after, strict=True)
        return dict(zip(names, triples, strict=True))


def copied(values: Tensor) -> Tensor:
    return values.detach().to(torch.float64, copy=True).flatten()
