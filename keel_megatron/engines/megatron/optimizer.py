"""Megatron-core's DDP and (distributed) AdamW over the model chunks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch import nn

from keel_megatron.compat import adamw, clipping, data_parallel, masters
from keel_megatron.config.run import RunConfig
from keel_megatron.engines.megatron.overlap import (
    OverlappedDataParallel,
    overlaps_grad_reduce,
    overlaps_param_gather,
)
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
    wrapped = [OverlappedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    for chunk in wrapped:
        data_parallel.leave_out_collectives_of_one(chunk)
    return wrapped


def build_optimizer(config: RunConfig, chunks: list[Any], runtime: Runtime) -> Any:
    """AdamW over the wrapped chunks; fp32 masters under bf16; no decay of norm weights.

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
        use_gloo_process_groups=False,
    )
    for inner in optimizer.chained_optimizers:
        adamw.prepare(inner.optimizer)
        masters.copy_in_lists(inner)
    return optimizer


def set_learning_rate(optimizer: Any, config: RunConfig, value: float) -> None:
    """Give every parameter group this learning rate, and its decay (none for norm weights)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_mult"]
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
