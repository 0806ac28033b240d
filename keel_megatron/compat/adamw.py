"""torch's AdamW inside Megatron-core's optimizers: how it steps, saves and loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from keel_megatron.compat.patch_table import patch


@patch(
    changes="`fused`, `foreach` and `state` of the torch.optim.AdamW that Megatron-core builds",
    why="it builds AdamW without its one-kernel step, and AdamW allocates its moments in the first "
    "step: memory would run out after the start, and a checkpoint would find nowhere to go",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_adamw.py::test_it_steps_in_one_kernel_and_owns_its_state",
)
def prepare(adam: Any) -> None:
    """Give torch's AdamW its one-kernel step, and what it would allocate in the first one.

    Apex's and Transformer Engine's do both themselves, and are left as they are.
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


@contextmanager
@patch(
    changes="`float16_groups` of Float16OptimizerWithFloat16Params, while its state is described",
    why="its `sharded_state_dict` looks up the half-precision parameters alone, and fails on the "
    "norms' weights, which are fp32 in a bf16 model",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_adamw.py::test_fp32_parameters_of_a_bf16_model_are_described",
)
def fp32_parameters_described(inner: Any) -> Iterator[None]:
    """Within the block the optimizer's sharded state includes fp32 parameters.

    Args:
        inner: one of `ChainedOptimizer.chained_optimizers`.
    """
    if not isinstance(inner, Float16OptimizerWithFloat16Params):
        yield
        return
    half = inner.float16_groups
    inner.float16_groups = [
        [*low, *full] for low, full in zip(half, inner.fp32_from_fp32_groups, strict=True)
    ]
    try:
        yield
    finally:
        inner.float16_groups = half


@patch(
    changes="the settings of the groups in a loaded state, before Megatron-core sees them",
    why="it recognises a group by its settings, since 0.19 by its learning rates too: it would "
    "refuse a changed one, a checkpoint of an earlier version, and with 0.16.1 one of another Adam",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_adamw.py::test_groups_are_recognised_by_their_decay",
)
def identify_groups(loaded: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Give loaded groups this optimizer's settings; they are distinguished by their decay.

    Args:
        loaded: the groups of a loaded state; changed in place.
        own: the settings of this optimizer's groups, without `params` and `step`.
    """
    for group in loaded:
        group.update(next(mine for mine in own if mine["wd_mult"] == group["wd_mult"]))


@patch(
    changes="`step` in the state of the distributed optimizer's AdamW, after it is loaded",
    why="it gives all parameters one and the same counter, which each of them would then advance; "
    "and it looks for `step` among the sharded tensors, where it is not",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_adamw.py::test_every_parameter_counts_its_own_steps",
)
def load_parameter_state(inner: Any, sharded: dict[str, Any]) -> None:
    """Load masters and moments, with a step counter for each parameter.

    Args:
        inner: a `DistributedOptimizer` whose groups are loaded.
        sharded: its `param_state`, fully reshardable.
    """
    states = inner.optimizer.state.values()
    steps = [state.pop("step") for state in states]
    inner.load_parameter_state_from_fully_reshardable(sharded)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step.clone()
