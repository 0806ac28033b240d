"""Megatron-core's DDP and (distributed) AdamW over the model chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, ParamPredicate, get_megatron_optimizer
from torch import nn

from keel_megatron.compat import adamw, clipping, data_parallel, masters
from keel_megatron.config.run import RunConfig
from keel_megatron.engines.megatron.overlap import (
    OverlappedDataParallel,
    overlaps_grad_reduce,
    overlaps_param_gather,
)
from keel_megatron.engines.parameter_groups import ParameterGroup, groups_of
from keel_megatron.model.graphs import capturable_hooks
from keel_megatron.runtime.distributed import Runtime

BUCKET_SIZE: int | None = None
"""Parameters that are reduced together where that overlaps; None = Megatron-core's choice."""


def wrap_data_parallel(config: RunConfig, chunks: list[nn.Module], runtime: Runtime) -> list[Any]:
    """Each chunk in Megatron-core's DDP: contiguous fp32 gradients, reduced over the replicas."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=overlaps_grad_reduce(config, runtime),
        overlap_param_gather=overlaps_param_gather(config, runtime),
        bucket_size=BUCKET_SIZE,
    )
    # Every type of parameter is a bucket group of its own, on later chunks too (`disable_bucketing`
    # would make them one): gloo mixes up an all-gather of bf16 and fp32 parameters in one batch.
    with capturable_hooks(config.kernels.cuda_graphs and runtime.device.type == "cuda"):
        wrapped = [OverlappedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    for chunk in wrapped:
        data_parallel.leave_out_collectives_of_one(chunk)
    return wrapped


def build_optimizer(config: RunConfig, chunks: list[Any], runtime: Runtime) -> Any:
    """AdamW over the wrapped chunks, in the groups of `parameter_groups`; fp32 masters under bf16.

    Its moments are allocated here, so memory runs out now or never, and a checkpoint finds where
    to go.
    """
    clipping.install()
    settings, precision = config.optimizer, config.training.precision
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=precision == "bf16",
            params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=overlaps_param_gather(config, runtime),
        ),
        chunks,
        config_overrides=_overrides(config, chunks),
        use_gloo_process_groups=False,
    )
    for inner in optimizer.chained_optimizers:
        adamw.prepare(inner.optimizer)
        masters.copy_in_lists(inner)
    return optimizer


def set_learning_rate(optimizer: Any, config: RunConfig, value: float) -> None:
    """Give every parameter group its share of this learning rate, and its decay and epsilon."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_mult"]
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
        group["eps"] = config.optimizer.epsilon * group.get("eps_mult", 1.0)


def _overrides(config: RunConfig, chunks: list[Any]) -> dict[ParamKey, Any]:
    """The factors that are not all 1, as Megatron-core's entries of its parameter groups.

    It makes one group of the parameters with the same factors, and the same groups on every rank;
    first the one without entries.
    """
    overrides = {}
    groups = groups_of([chunk.module for chunk in chunks], config)
    for number, (factors, parameters) in enumerate(groups.items()):
        if factors == ParameterGroup():
            continue
        members = frozenset(map(id, parameters))
        key = ParamKey(predicate=ParamPredicate(f"group {number}", _is_in(members)))
        overrides[key] = {
            "lr_mult": factors.rate,
            "wd_mult": factors.decay,
            "eps_mult": factors.epsilon,
        }
    return overrides


def _is_in(members: frozenset[int]) -> Callable[[nn.Parameter], bool]:
    return lambda parameter: id(parameter) in members
