"""One step's loss, gradients and update of a model on a device, from given weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from tests.training.ranks import made_up_batches

Tensors = dict[str, Tensor]


def exact_steps(runs: list[dict[str, dict[str, Any]]]) -> list[tuple[Tensors, float, Tensors]]:
    """`exact_step` of several models."""
    return [exact_step(sections) for sections in runs]


def device_steps(
    runs: list[tuple[dict[str, dict[str, Any]], Tensors]], device: str
) -> list[tuple[float, Tensors, Tensors]]:
    """`device_step` of several models and their weights."""
    return [device_step(sections, weights, device) for sections, weights in runs]


def exact_step(sections: dict[str, dict[str, Any]]) -> tuple[Tensors, float, Tensors]:
    """Initial weights (rounded to bf16), loss and gradients in fp64 on the CPU."""
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(_with(sections, "training", device="cpu"))
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime, compute_dtype=torch.float64)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.copy_(parameter.bfloat16())
        weights = {name: p.detach().clone() for name, p in chunk.named_parameters()}
        (batch,) = made_up_batches(config, runtime, 0)
        loss = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels).mean()
        loss.backward()
        return weights, loss.item(), {name: p.grad for name, p in chunk.named_parameters()}


def device_step(
    sections: dict[str, dict[str, Any]], weights: Tensors, device: str
) -> tuple[float, Tensors, Tensors]:
    """The same on a device in the configured precision, and the weights after an optimizer step."""
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(_with(sections, "training", device=device))
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime)
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                parameter.copy_(weights[name])
        (batch,) = (batch.to(runtime.device) for batch in made_up_batches(config, runtime, 0))
        loss = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels).mean()
        loss.backward()
        gradients = {name: p.grad.double().cpu() for name, p in chunk.named_parameters()}
        chunk.zero_grad()
        engine = MegatronEngine(config, runtime, [chunk])
        result = engine.train_step([batch], 1, config.optimizer.learning_rate)
        assert abs(result.loss - loss.item()) < 1e-3
        updated = {name: p.detach().double().cpu() for name, p in chunk.named_parameters()}
    return loss.item(), gradients, updated


def _with(sections: dict[str, dict[str, Any]], section: str, **values: Any) -> dict[str, Any]:
    return {**sections, section: {**sections[section], **values}}
