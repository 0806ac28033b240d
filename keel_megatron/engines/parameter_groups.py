"""Which learning rate, weight decay and epsilon a parameter has: factors of the run's settings.

The one place where both engines and every optimizer look this up. The factors come from the
configuration and from the residual rule, never from a checkpoint, so that a resume takes them from
the configuration as every other setting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from keel_megatron.architecture.residual import epsilon_scale
from keel_megatron.config.optimizer import OptimizerConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.model.initialization import global_parameters

EMBEDDING, HEAD = "embedding.", "output_layer."
_MIX = "_streams.weight"
_BLOCK = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, order=True)
class ParameterGroup:
    """Factors of `optimizer.learning_rate`, `weight_decay` and `epsilon` for a parameter.

    Decay is decoupled: a step takes learning rate x rate x weight_decay x decay of the weight.
    """

    rate: float = 1.0
    decay: float = 1.0
    epsilon: float = 1.0


def parameter_group(name: str, dimensions: int, config: RunConfig) -> ParameterGroup:
    """The factors of a parameter.

    Args:
        name: as `model.initialization.global_parameters` gives it: with the block's number in the
            whole model, and the embedding's name for a head that shares its matrix.
        dimensions: of the parameter; vectors are norm weights and what is treated as them.
        config: the run.
    """
    settings, block = config.optimizer, block_of(name)
    return ParameterGroup(
        rate=_rate_of_kind(name, dimensions, settings) * _rate_of_depth(block, settings),
        decay=1.0 if dimensions > 1 or (settings.decay_norms and not is_mix(name)) else 0.0,
        epsilon=1.0 if block is None else epsilon_scale(config.model),
    )


def is_mix(name: str) -> bool:
    """Whether a parameter is a mix of streams, which never decays.

    A mix is the skip path of its sub-layer, an identity at first. Decay would shrink the stream in
    every sub-layer anew; hyper-connections (arXiv 2409.19606) do not decay it either.
    """
    return name.endswith(_MIX)


def block_of(name: str) -> int | None:
    """Number of the block, from 0, that a parameter belongs to; None outside the blocks."""
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])


def groups_of(
    chunks: Iterable[nn.Module], config: RunConfig
) -> dict[ParameterGroup, list[nn.Parameter]]:
    """The parameters of this rank's unwrapped model chunks by their factors, in model order."""
    found: dict[ParameterGroup, list[nn.Parameter]] = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk, tied=config.model.tie_embeddings):
            group = parameter_group(name, parameter.dim(), config)
            found.setdefault(group, []).append(parameter)
    return found


def _rate_of_kind(name: str, dimensions: int, settings: OptimizerConfig) -> float:
    if dimensions == 1:
        return settings.rates.norms
    if name.startswith(EMBEDDING):
        return settings.rates.embeddings
    return settings.rates.head if name.startswith(HEAD) else settings.rates.matrices


def _rate_of_depth(block: int | None, settings: OptimizerConfig) -> float:
    for entry in settings.depth_rates:
        first, last = entry.blocks
        if block is not None and first <= block <= last:
            return entry.factor
    return 1.0
