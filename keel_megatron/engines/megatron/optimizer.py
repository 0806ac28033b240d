"""Megatron-core's DDP and (distributed) AdamW over the model chunks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, get_megatron_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor, nn

from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.distributed import Runtime


def wrap_data_parallel(config: RunConfig, chunks: list[nn.Module]) -> list[Any]:
    """Each chunk in Megatron-core's DDP: contiguous fp32 gradients, reduced over the replicas."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=False,
    )
    # Every type of parameter is a bucket group of its own, on later chunks too (`disable_bucketing`
    # would make them one): gloo mixes up an all-gather of bf16 and fp32 parameters in one batch.
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    for chunk in wrapped:
        _leave_out_collectives_of_one(chunk)
    return wrapped


def _leave_out_collectives_of_one(wrapped: Any) -> None:
    """With one replica there is nothing to reduce or to gather, and gloo copies it all the same."""
    if not wrapped.ddp_config.use_distributed_optimizer:
        return  # an all-reduce within one rank does nothing already
    for group in wrapped.bucket_groups:
        if group.intra_distributed_optimizer_instance_size == 1:
            group.start_grad_sync = group.finish_grad_sync = _nothing
            group.start_param_sync = _nothing


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In a collective's place."""


def build_optimizer(config: RunConfig, chunks: list[Any], runtime: Runtime) -> Any:
    """AdamW over the wrapped chunks; fp32 masters under bf16; norm gains without decay.

    Its moments are allocated here, so memory runs out now or never, and a checkpoint finds where
    to go.
    """
    _norm_and_scale_at_once()
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
        ),
        chunks,
        use_gloo_process_groups=runtime.device.type == "cuda",
    )
    for inner in optimizer.chained_optimizers:
        _prepare(inner.optimizer)
    return optimizer


def _norm_and_scale_at_once() -> None:
    """Let Megatron-core clip with torch's operators on lists of tensors.

    Where neither Apex nor Transformer Engine is, megatron-core 0.16.1 goes through the gradients
    one by one in Python, and on CUDA waits for the norm of each.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _norm(
    _chunk_size: int, _flag: Tensor, lists: list[list[Tensor]], _per_tensor: bool
) -> tuple[Tensor, None]:
    """Norm of all tensors together: [1], fp32; called like `amp_C.multi_tensor_l2norm`."""
    tensors = [tensor for tensors in lists for tensor in tensors]
    norm = nn.utils.get_total_norm(tensors, foreach=True)
    return norm.to(torch.float32).view(1), None


def _scale(_chunk_size: int, _flag: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Sources times a factor into targets; called like `amp_C.multi_tensor_scale`."""
    sources, targets = lists
    if targets is sources:
        torch._foreach_mul_(targets, factor)
    else:
        torch._foreach_copy_(targets, torch._foreach_mul(sources, factor))


def _prepare(adam: Any) -> None:
    """Give torch's AdamW its one-kernel step, and what it would allocate in the first one.

    Apex's and Transformer Engine's do both themselves.
    """
    if not isinstance(adam, torch.optim.AdamW):
        return
    for group in adam.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def set_learning_rate(optimizer: Any, config: RunConfig, value: float) -> None:
    """Give every parameter group this learning rate, and its decay (none for norm gains)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_mult"]
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
