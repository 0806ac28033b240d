"""Faults that a strict trace must catch; each changes this process, before it traces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def _after_stand_ins(change: Callable[[], None]) -> None:
    """Make the change when the stand-ins are in their places."""
    from keel_megatron.planner.trace import stand_ins

    install = stand_ins.install

    def both(*arguments: Any) -> None:
        install(*arguments)
        change()

    stand_ins.install = both


def a_table_on_the_host() -> None:
    """The rotary table stays on the host."""
    from keel_megatron.model.rotary import RotaryTable

    plain = RotaryTable.forward

    def forward(self: Any, seq_length: int, **rest: Any) -> torch.Tensor:
        return plain(self, seq_length, **rest).cpu()

    RotaryTable.forward = forward  # type: ignore[method-assign]


def a_number_of_the_host() -> None:
    """The join in torch's operators, with addcmul's first operand a scalar of the host's."""
    from keel_megatron import kernels
    from keel_megatron.kernels import fused
    from keel_megatron.model import layer

    def rstd(u: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        return torch.addcmul(torch.tensor(eps), norm, norm, value=1 / u.size(-1)).rsqrt_()

    fused.row_rstd = rstd
    operators = functools.partial(kernels.scaled_add_norm, backend="torch")
    _after_stand_ins(lambda: setattr(layer, "scaled_add_norm", operators))


def joins_in_operators() -> None:
    """No fault: the join in torch's operators, as it is."""
    from keel_megatron import kernels
    from keel_megatron.model import layer

    operators = functools.partial(kernels.scaled_add_norm, backend="torch")
    _after_stand_ins(lambda: setattr(layer, "scaled_add_norm", operators))


def a_wait_in_the_loss() -> None:
    """The loss of every micro-batch is read."""
    from keel_megatron.engines.megatron import engine

    plain = engine.mean_loss

    def mean_loss(*arguments: Any) -> torch.Tensor:
        loss = plain(*arguments)
        assert float(loss) > 0.0
        return loss

    engine.mean_loss = mean_loss


def a_plan_without_head_norms() -> None:
    """The plan forgets what the norms of query and key keep."""
    from keel_megatron.layout import block_costs

    block_costs._head_norms_bytes = lambda *_arguments: 0  # type: ignore[assignment]


def a_plan_that_counts_activations_twice() -> None:
    """The plan takes every block's activations for twice what they are."""
    from keel_megatron.layout.work import Cost

    plain = Cost.kept_bytes
    Cost.kept_bytes = lambda *arguments: 2 * plain(*arguments)  # type: ignore[method-assign]


def a_save_that_gathers() -> None:
    """The largest master of all replicas is gathered before it is written."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from keel_megatron.checkpoint.megatron_state import MegatronState

    plain = MegatronState.to_save

    def to_save(self: Any, *, copy: bool) -> Any:
        saved = plain(self, copy=False)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        mine = max((piece.values for piece in saved.pieces), key=torch.Tensor.numel)
        whole = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(whole, mine, group=group)
        return plain(self, copy=copy)

    MegatronState.to_save = to_save  # type: ignore[method-assign]
