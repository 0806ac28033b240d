"""Megatron-core's DDP: one replica, and gradients that are summed within their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from keel_megatron.compat.patch_table import patch


@patch(
    changes="`start_grad_sync`, `finish_grad_sync` and `start_param_sync` of DDP's bucket groups",
    why="with the distributed optimizer and one replica there is nothing to reduce or to gather, "
    "and gloo copies every gradient and parameter all the same",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_data_parallel.py::test_one_replica_starts_no_collective",
)
def leave_out_collectives_of_one(wrapped: Any) -> None:
    """Let a DDP over one replica start no collectives.

    Args:
        wrapped: a `DistributedDataParallel`.
    """
    if not wrapped.ddp_config.use_distributed_optimizer:
        return  # an all-reduce within one rank does nothing already
    for group in wrapped.bucket_groups:
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_grad_sync = group.finish_grad_sync = _nothing
            group.start_param_sync = _nothing


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In a collective's place."""


@patch(
    changes="the hook with which DDP notes that a parameter's gradient is complete",
    why="with overlapped reduction it asserts `param.grad`, so a layer that adds the weight's "
    "gradient to `main_grad` itself would have to allocate one that nobody reads",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/engines/megatron/test_overlap.py::test_gradients_are_reduced_before_the_pass_ends",
)
def ready_without_gradient(
    hook: Callable[..., None], wrapped: Any, parameter: Tensor
) -> Callable[..., None]:
    """The hook for a parameter whose gradient may be in `main_grad` already.

    Args:
        hook: DDP's own.
        wrapped: the `DistributedDataParallel`.
        parameter: one of its parameters.
    """
    if not wrapped.ddp_config.overlap_grad_reduce:
        return hook

    def ready(*arguments: Any) -> None:
        if parameter.grad is not None:
            hook(*arguments)
        else:
            group = wrapped.param_to_bucket_group[parameter]
            group.register_grad_ready(parameter, wrapped.force_all_reduce)

    return ready
