"""Gradient clipping with torch's operators on lists of tensors."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor, nn

from keel_megatron.compat.patch_table import patch


@patch(
    changes="`megatron.core.optimizer.clip_grads.l2_norm_impl` and `multi_tensor_scale_impl`",
    why="without Apex and Transformer Engine it goes through the gradients one by one in Python, "
    "and on CUDA waits for the norm of each",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_clipping.py::test_megatron_core_clips_with_lists",
)
def install() -> None:
    """Let Megatron-core clip with torch's foreach operators, where it has no faster ones."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


@patch(
    changes="nothing; calls the method of a MegatronOptimizer by the name that its version has",
    why="0.19 calls it `get_grads_for_grad_norm`, earlier versions `get_main_grads_for_grad_norm`",
    needed_by="megatron-core 0.19.2",
    test="tests/compat/test_clipping.py::test_gradients_are_read_by_any_version",
)
def gradients_for_norm(optimizer: Any) -> list[Tensor]:
    """Gradients of this rank's parameters that count for the global norm, each once."""
    newer = getattr(optimizer, "get_grads_for_grad_norm", None)
    found = optimizer.get_main_grads_for_grad_norm() if newer is None else newer()
    return list(found)


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
