"""torch's AdamW inside Megatron-core's optimizers."""

from __future__ import annotations

import torch

from keel_megatron.compat import adamw


def test_it_steps_in_one_kernel_and_owns_its_state() -> None:
    plain, prepared = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    reference, adam = torch.optim.AdamW([plain], lr=0.1), torch.optim.AdamW([prepared], lr=0.1)
    adamw.prepare(adam)
    assert adam.param_groups[0]["fused"]
    assert not adam.state[prepared]["exp_avg_sq"].any()
    plain.grad, prepared.grad = torch.ones(7), torch.ones(7)
    for optimizer in (reference, adam):
        optimizer.step()
    torch.testing.assert_close(prepared, plain)
    others = object()
    adamw.prepare(others)  # Apex's and Transformer Engine's are not torch's
