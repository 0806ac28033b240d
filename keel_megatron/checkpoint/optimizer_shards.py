"""What this rank's optimizer keeps of each parameter, with one interface for all of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from keel_megatron.checkpoint.parameters import MASTER, MOMENTS, MUON_STATES, STATES


class WholeMatrices(Protocol):
    """The parameters of Muon, each of which one replica updates."""

    def __contains__(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is Muon's."""

    def owned(self, parameter: nn.Parameter) -> slice | None:
        """All elements of the parameter if this replica updates it, else None."""

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Master and momentum of an owned parameter, flat: Muon's own memory."""

    def spread_masters(self) -> None:
        """Copy the masters into the weights of the passes; collective over the replicas."""


class OptimizerShards:
    """Masters, moments and the count of updates of a Megatron-core optimizer, and of Muon.

    With the distributed optimizer every replica holds a flat range of a parameter of AdamW's,
    without it all of it. Of Muon's parameters one replica holds all and the others nothing.

    Args:
        optimizer: a chain of one Megatron-core optimizer, around any AdamW.
        muon: what Muon updates; None: AdamW updates all.
    """

    def __init__(self, optimizer: Any, muon: WholeMatrices | None = None) -> None:
        (self._inner,) = optimizer.chained_optimizers
        self._muon = muon
        self._adam = self._inner.optimizer
        self.is_distributed = hasattr(self._inner, "model_param_gbuf_map")

    def is_replicated(self, parameter: nn.Parameter) -> bool:
        """Whether every replica holds the same states of all elements."""
        return not self.is_distributed and self._whole(parameter) is None

    def names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Of the states of a parameter, the master first."""
        return STATES if self._whole(parameter) is None else MUON_STATES

    def owned(self, parameter: nn.Parameter) -> slice | None:
        """Elements of the flat parameter that this rank's optimizer updates; None if none."""
        if (whole := self._whole(parameter)) is not None:
            return whole.owned(parameter)
        if not self.is_distributed:
            return slice(0, parameter.numel())
        if parameter not in self._inner.model_param_gbuf_map:
            return None
        owned = self._inner._get_model_param_range_map(parameter)["param"]
        return slice(owned.start, owned.end)

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Master and moments of the elements that it owns, flat: the optimizer's own memory."""
        if (whole := self._whole(parameter)) is not None:
            return whole.states(parameter)
        master = self._master(parameter)
        state = self._adam.state[master]
        for name in MOMENTS:
            if name not in state:  # Apex's and Transformer Engine's make them in the first step
                state[name] = torch.zeros_like(master, dtype=torch.float32)
        flat = {name: state[name].detach().view(-1) for name in MOMENTS}
        return {MASTER: master.detach().view(-1), **flat}

    @torch.no_grad()
    def spread_masters(self, parameters: list[nn.Parameter]) -> None:
        """Copy the masters into the weights of the passes; collective over the replicas."""
        models = self._inner.model_chunks if self.is_distributed else []
        for model in models:
            if model.ddp_config.overlap_param_gather:
                model.start_param_sync(force_sync=True)  # one may be under way, from these weights
        for parameter in parameters:
            owned = self.owned(parameter)
            if owned is None or self._whole(parameter) is not None:
                continue
            master = self._master(parameter).view(-1)
            weights = parameter.data.view(-1)[owned]
            if weights.data_ptr() != master.data_ptr():  # under fp32 they are the masters
                weights.copy_(master)
        for model in models:
            model.start_param_sync(force_sync=True)
        if self._muon is not None:
            self._muon.spread_masters()

    @property
    def updates(self) -> int:
        """Updates that Adam has counted; the same for all parameters.

        0 on a rank that has none of AdamW's: a middle stage with Muon has only norm weights, fewer
        than some replicas' ranges. Rank 0, whose count is saved, has some of the embedding.
        """
        for state in self._adam.state.values():
            if "step" in state:
                return int(state["step"])
        return max((int(group.get("step", 0)) for group in self._adam.param_groups), default=0)

    def set_updates(self, count: int) -> None:
        """Set Adam's count of updates."""
        if isinstance(self._adam, torch.optim.AdamW):
            for state in self._adam.state.values():
                state["step"].fill_(count)
        else:
            for group in self._adam.param_groups:
                group["step"] = count

    def _whole(self, parameter: nn.Parameter) -> WholeMatrices | None:
        """Muon, if it updates a parameter."""
        return self._muon if self._muon is not None and parameter in self._muon else None

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """What Adam's groups and state know the parameter by."""
        if self.is_distributed:
            group, order = self._inner.model_param_group_index_map[parameter]
            master: Tensor = self._adam.param_groups[group]["params"][order]
            return master
        main: Tensor | None = getattr(parameter, "main_param", None)
        return parameter if main is None else main
