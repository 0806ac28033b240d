"""Settings that the DeepSpeed engine, Muon or the distributed optimizer do not support or need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from keel_megatron.config.run import RunConfig

Check = Callable[[RunConfig], Iterator[tuple[str, str]]]


def _not_with_deepspeed(path: str, is_set: Callable[[RunConfig], bool], reason: str) -> Check:
    """The check that a setting which the DeepSpeed engine does not support is not set."""

    def check(config: RunConfig) -> Iterator[tuple[str, str]]:
        if config.training.engine == "deepspeed" and is_set(config):
            yield path, f"is not supported with training.engine: deepspeed: {reason}"

    return check


def _not_with_muon(
    name: Literal["overlap_grad_reduce", "overlap_param_gather"],
) -> Check:
    """The check that an overlap of communication and passes is not asked of Muon's matrices."""

    def check(config: RunConfig) -> Iterator[tuple[str, str]]:
        if config.optimizer.name == "muon" and getattr(config.parallel, name):
            yield (
                f"parallel.{name}",
                "is not supported with optimizer.name: muon, whose matrices are reduced after the "
                "passes and gathered after the update; set it to false",
            )

    return check


def _overlap_param_gather(config: RunConfig) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield (
            "parallel.overlap_param_gather",
            "true needs parallel.distributed_optimizer: true; without it no weights are gathered",
        )


def _offload_parameters(config: RunConfig) -> Iterator[tuple[str, str]]:
    own = config.deepspeed
    if own.offload_parameters and (own.zero_stage < 3 or not own.offload_optimizer):
        yield (
            "deepspeed.offload_parameters",
            "true needs deepspeed.zero_stage: 3 and deepspeed.offload_optimizer: true",
        )


ENGINE_CHECKS: tuple[Check, ...] = (
    _not_with_deepspeed(
        "parallel.pipeline",
        lambda run: run.parallel.pipeline > 1,
        "under a pipeline schedule, ZeRO keeps only the last micro-batch's gradients; set it to 1",
    ),
    _not_with_deepspeed(
        "parallel.virtual_pipeline",
        lambda run: run.parallel.virtual_pipeline > 1,
        "there is only one pipeline stage; set it to 1",
    ),
    _not_with_deepspeed(
        "parallel.sequence",
        lambda run: run.parallel.sequence,
        "ZeRO does not reduce the gradients of norm weights over the tensor-parallel group; set it "
        "to false",
    ),
    _not_with_deepspeed(
        "parallel.distributed_optimizer",
        lambda run: not run.parallel.distributed_optimizer,
        "every ZeRO stage shards the optimizer state; set it to true",
    ),
    _not_with_deepspeed(
        "parallel.overlap_grad_reduce",
        lambda run: run.parallel.overlap_grad_reduce,
        "ZeRO reduces gradients in its own way; set it to false",
    ),
    _not_with_deepspeed(
        "parallel.overlap_param_gather",
        lambda run: run.parallel.overlap_param_gather,
        "ZeRO gathers weights in its own way; set it to false",
    ),
    _not_with_deepspeed(
        "optimizer.name",
        lambda run: run.optimizer.name == "muon",
        "ZeRO's shards cut through matrices, which Muon needs whole; set it to adamw",
    ),
    _not_with_muon("overlap_grad_reduce"),
    _not_with_muon("overlap_param_gather"),
    _overlap_param_gather,
    _offload_parameters,
)
"""One check each, as in `checks.py`."""
