"""The shards of parameters that ZeRO keeps on this rank, with one interface for all stages.

ZeRO flattens the parameters and shards their fp32 masters and moments over the replicas. Under
stages 1 and 2 (`stage_1_and_2.py`, deepspeed 0.19.8) a group of parameters is one long tensor that
is split without regard to parameters: a rank holds part of a parameter, all of it, or nothing.
Under stage 3 (`stage3.py`) every parameter is split into equal shards, the last of them padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keel_megatron.checkpoint.parameters import MASTER, MOMENTS


@dataclass(frozen=True)
class Shard:
    """A rank's shard of a flat parameter, its gradient or its optimizer state."""

    start: int
    values: Tensor
    """[n], ZeRO's own memory: writing here changes its state."""


class ZeroShards:
    """Reads and writes the shards that this rank holds.

    Args:
        optimizer: DeepSpeed's, around an AdamW.
        stage: of ZeRO.
        group: the data-parallel process group.
        device: of the forward and backward passes.
    """

    def __init__(self, optimizer: Any, stage: int, group: Any, device: torch.device) -> None:
        self._optimizer = optimizer
        self._stage = stage
        self._group = group
        self._rank = dist.get_rank(group)
        self._device = device

    def state(self, parameter: nn.Parameter, name: str) -> Shard | None:
        """This rank's shard of the master (`MASTER`) or of a moment; None if it has none."""
        key = None if name == MASTER else name
        if self._stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            return Shard(mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach())
        values, _group = self._optimizer._get_fp32_opt_state_partition(parameter, False, key)
        return self._unpadded(parameter, values.detach())

    def gradient(self, parameter: nn.Parameter) -> Shard | None:
        """This rank's shard of the averaged gradient; from the last backward pass to the step."""
        if self._stage < 3:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            address = mapping.lp_fragment_address
            index = parameter._index_in_param_group  # type: ignore[attr-defined]
            values = mapping.get_lp_grad_fragment(index).detach().flatten()
            return Shard(address.start, values[: address.numel])
        values, _group = self._optimizer._get_fp32_grad_state_partition(parameter, True)
        return self._unpadded(parameter, values.detach().flatten())

    def _unpadded(self, parameter: Any, values: Tensor) -> Shard | None:
        start = values.numel() * self._rank
        count = min(values.numel(), parameter.ds_numel - start)
        return Shard(start, values[:count]) if count > 0 else None

    def collect(
        self, parameter: nn.Parameter, shape: torch.Size, name: str, owner: int
    ) -> Tensor | None:
        """The whole master or moment, to the last bit, on the replica `owner`; None on the others.

        Collective over the replicas.
        """
        shard = self.state(parameter, name)
        # As integers: 0 + x is x for all of them, while 0.0 + -0.0 is 0.0.
        whole = torch.zeros(shape.numel(), dtype=torch.int32, device=self._device)
        if shard is not None:
            end = shard.start + shard.values.numel()
            whole[shard.start : end] = shard.values.view(torch.int32).to(self._device)
        dist.reduce(whole, group=self._group, group_dst=owner)
        return whole.view(torch.float32).view(shape) if self._rank == owner else None

    @torch.no_grad()
    def spread_masters(self) -> None:
        """Copy the masters into the parameters of the passes; collective over the replicas."""
        optimizer = self._optimizer
        if self._stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()  # a gathered parameter would count as up to date
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @torch.no_grad()
    def allocate_moments(self) -> None:
        """Allocate what AdamW would in its first step, so that a checkpoint can be read into it."""
        adam = self._optimizer.optimizer
        if self._stage < 3:
            flats = self._optimizer.single_partition_of_fp32_groups
        else:
            flats = self._optimizer.fp32_partitioned_groups_flat
        for flat in flats:
            state = adam.state[flat]
            if state:
                continue
            state["step"] = 0
            if isinstance(adam, torch.optim.AdamW):
                # The fused one counts on the device.
                place = flat.device if adam.defaults["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            for name in MOMENTS:
                state[name] = torch.zeros_like(flat)
        if self._stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def steps(self) -> int:
        """Updates that Adam has counted."""
        return max(int(state["step"]) for state in self._optimizer.optimizer.state.values())

    def set_steps(self, count: int) -> None:
        """Set Adam's count of updates."""
        for state in self._optimizer.optimizer.state.values():
            if torch.is_tensor(state["step"]):
                state["step"].fill_(count)
            else:
                state["step"] = count

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global norm of the averaged gradients before clipping; infinite if one is not finite.

        A scalar, which nothing has waited for.

        As ZeRO itself takes it in its step; collective over all ranks.
        """
        if self._stage < 3:
            norm = self._optimizer.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(self._optimizer._get_norm_groups())
        return torch.as_tensor(norm)
