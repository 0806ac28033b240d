"""Megatron-core's DDP where there is one replica."""

from __future__ import annotations

from typing import Any

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
