"""Muon over the replicas: the matrices of the blocks, each updated by the replica that owns it.

Megatron-core's DDP and optimizer never see these matrices. They take the parameters that require a
gradient when they are built, and are built within `left_out`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from keel_megatron.architecture.block_weights import block_weights
from keel_megatron.checkpoint.parameters import MASTER, MOMENTUM
from keel_megatron.config.run import RunConfig
from keel_megatron.engines.megatron.muon.buffers import FlatBuffers, Key
from keel_megatron.engines.megatron.muon.orthogonalize import working_dtype
from keel_megatron.engines.megatron.muon.update import Settings, Stack, update
from keel_megatron.engines.parameter_groups import ParameterGroup, block_of, parameter_group
from keel_megatron.layout.matrix_owners import OwnedStack, regions
from keel_megatron.model.initialization import global_parameters
from keel_megatron.runtime.distributed import Runtime

Named = Mapping[Key, tuple[str, nn.Parameter]]
"""Of each matrix of a stage its name in the whole model, and this rank's shard."""


def build_muon(config: RunConfig, chunks: list[nn.Module], runtime: Runtime) -> Muon | None:
    """Muon over this rank's blocks, which are not yet in DDP; None: there are none, or AdamW's."""
    named = _weights(config, chunks) if config.optimizer.name == "muon" else {}
    return Muon(config, named, runtime) if named else None


class Muon:
    """Masters and momenta of what this replica owns, and the update; a `WholeMatrices`.

    Args:
        config: the run.
        named: the matrices of this rank's blocks and their names; they become views of buffers.
        runtime: this rank's place.
    """

    def __init__(self, config: RunConfig, named: Named, runtime: Runtime) -> None:
        self._config = config
        self._tensor_group = parallel_state.get_tensor_model_parallel_group()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        weights = {key: parameter for key, (_name, parameter) in named.items()}
        self._parameters = set(weights.values())
        kinds, tensor = block_weights(config.model), runtime.tensor_size
        placed = regions(kinds, len(weights) // len(kinds), group.size(), tensor)
        self._buffers = FlatBuffers(weights, placed, group, tensor)
        own = self._buffers.own_weights
        self._masters = own if own.dtype == torch.float32 else own.float()
        self._momenta = torch.zeros_like(self._masters)
        self._states: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._stacks: list[Stack] = []
        for owned in placed.owners[group.rank()]:
            keys = [(owned.weight.name, block) for block in owned.blocks]
            names, parameters = zip(*(named[key] for key in keys), strict=True)
            stack = self._stack(owned, [parameter_group(name, 2, config) for name in names])
            self._stacks.append(stack)
            for number, parameter in enumerate(parameters):
                states = {MASTER: stack.masters[number], MOMENTUM: stack.momenta[number]}
                flat = {name: values.view(-1) for name, values in states.items()}
                self._states[parameter] = flat

    def __contains__(self, parameter: nn.Parameter) -> bool:
        """Whether Muon updates a parameter, on this replica or another."""
        return parameter in self._parameters

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within the block no matrix of Muon's requires a gradient."""
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(True)

    def zero_grad(self) -> None:
        """Start the sums of a step's gradients."""
        self._buffers.zero_gradients()

    def reduce(self) -> None:
        """Give every owner the averaged gradients; collective over the replicas."""
        self._buffers.reduce()

    def squared_norm(self) -> Tensor:
        """Square of the norm of the gradients that this rank owns, fp32."""
        # Of each matrix first: in one sum of all elements fp32 loses a digit.
        norms = [torch.linalg.vector_norm(one.gradients, dim=(1, 2)) for one in self._stacks]
        if not norms:
            return self._masters.new_zeros(())
        return torch.cat(norms).square().sum()

    def clip(self, limit: float, grad_norm: float) -> None:
        """Scale the gradients as Megatron-core's `clip_grad_by_total_norm_fp32` scales AdamW's."""
        factor = limit / (grad_norm + 1e-6)
        if factor < 1.0:
            self._buffers.own_gradients.mul_(factor)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all matrices; collective over the tensor group and the replicas."""
        chosen = self._config.optimizer
        settings = Settings(
            learning_rate=learning_rate,
            weight_decay=chosen.weight_decay,
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            ns_steps=chosen.ns_steps,
            adjust_lr_fn=chosen.adjust_lr_fn,
        )
        dtype = working_dtype(self._masters.device)
        update(self._stacks, settings, dtype, self._tensor_group)
        self.spread_masters()

    def owned(self, parameter: nn.Parameter) -> slice | None:
        """As `WholeMatrices.owned`."""
        return slice(0, parameter.numel()) if parameter in self._states else None

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """As `WholeMatrices.states`."""
        return self._states[parameter]

    @torch.no_grad()
    def spread_masters(self) -> None:
        """As `WholeMatrices.spread_masters`."""
        if self._masters is not self._buffers.own_weights:
            self._buffers.own_weights.copy_(self._masters)
        self._buffers.gather()

    def _stack(self, owned: OwnedStack, groups: list[ParameterGroup]) -> Stack:
        """What this replica owns of one kind of weight, with the factors of each block."""
        buffers, device = self._buffers, self._masters.device
        return Stack(
            owned.weight,
            masters=buffers.stack(self._masters, owned),
            gradients=buffers.stack(buffers.own_gradients, owned),
            momenta=buffers.stack(self._momenta, owned),
            rates=torch.tensor([group.rate for group in groups], device=device),
            decays=torch.tensor([group.decay for group in groups], device=device),
        )


def _weights(config: RunConfig, chunks: list[nn.Module]) -> Named:
    """The matrices of this rank's blocks."""
    kinds = {weight.name for weight in block_weights(config.model)}
    numbers: dict[int, int] = {}  # block of the model -> block of the stage
    found = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk, tied=config.model.tie_embeddings):
            block, (*_modules, kind, values) = block_of(name), name.split(".")
            if block is not None and kind in kinds and values == "weight":
                number = numbers.setdefault(block, len(numbers))
                found[kind, number] = name, parameter
    assert len(found) == len(kinds) * len(numbers), "a block lacks one of its matrices"
    return found
