"""torch's AdamW inside Megatron-core's optimizers: how it steps, and that it has its state."""

from __future__ import annotations

from typing import Any

import torch

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
