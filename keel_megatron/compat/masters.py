"""Copies of fp32 masters to the model's weights, as one operator on lists of tensors."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from keel_megatron.compat.patch_table import patch

Lists = tuple[list[Tensor], list[Tensor]]
"""Weights and their masters."""


@patch(
    changes="`_copy_main_params_to_model_params` of an optimizer with masters",
    why="it copies parameter by parameter, the fp32 ones onto themselves: one kernel and a "
    "dictionary look-up for each in every step",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_masters.py::test_masters_are_copied_in_one_call",
)
def copy_in_lists(inner: Any) -> None:
    """Let an optimizer copy its masters to the weights with torch's foreach operator.

    The lists are built in the first step and kept: masters and buffers stay where they are.

    Args:
        inner: one of `ChainedOptimizer.chained_optimizers`; one without masters is left as it is.
    """
    if not isinstance(inner, DistributedOptimizer | Float16OptimizerWithFloat16Params):
        return
    if inner.is_stub_optimizer or _is_fp8(inner):
        return
    kept: list[Lists] = []

    @torch.no_grad()
    def copy() -> None:
        if not kept:
            kept.append(_lists(inner))
        weights, masters = kept[0]
        if weights:
            torch._foreach_copy_(weights, masters)

    inner._copy_main_params_to_model_params = copy


def _lists(inner: Any) -> Lists:
    """The weights that have a master elsewhere in memory, and those masters."""
    if isinstance(inner, DistributedOptimizer):
        pairs = [
            *zip(inner.model_float16_groups, inner.shard_fp32_from_float16_groups, strict=True),
            *zip(inner.model_fp32_groups, inner.shard_fp32_groups, strict=True),
        ]
    else:
        pairs = [*zip(inner.float16_groups, inner.fp32_from_float16_groups, strict=True)]
    weights, masters = [], []
    for group, shards in pairs:
        for parameter, master in zip(group, shards, strict=True):
            weight = parameter.detach()
            if isinstance(inner, DistributedOptimizer):
                owned = inner._get_model_param_range_map(parameter)["param"]
                weight = weight.view(-1)[owned.start : owned.end]
            if weight.data_ptr() != master.data_ptr():
                weights.append(weight)
                masters.append(master.detach())
    return weights, masters


def _is_fp8(inner: Any) -> bool:
    """Whether weights are kept in fp8: Megatron-core quantizes those itself."""
    groups = (
        inner.model_float16_groups
        if isinstance(inner, DistributedOptimizer)
        else inner.float16_groups
    )
    return any(is_float8tensor(parameter) for group in groups for parameter in group)
