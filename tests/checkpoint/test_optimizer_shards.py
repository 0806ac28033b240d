"""What an Adam keeps of its parameters, torch's and others'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from keel_megatron.checkpoint.optimizer_shards import OptimizerShards


def shards(adam: Any) -> OptimizerShards:
    inner = SimpleNamespace(optimizer=adam)
    return OptimizerShards(SimpleNamespace(chained_optimizers=[inner]))


def test_every_parameter_counts_its_own_updates() -> None:
    """Each has a tensor of its own, which the next step advances once."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    adam = torch.optim.AdamW(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        adam.step()
        shards(adam).set_updates(7)
    adam.step()
    assert [adam.state[parameter]["step"].item() for parameter in parameters] == [8.0, 8.0]
    assert shards(adam).updates == 8


def test_another_adam_makes_its_moments_late_and_counts_in_its_groups() -> None:
    """As Apex's and Transformer Engine's do."""
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    adam = SimpleNamespace(state={parameter: {}}, param_groups=[{"params": [parameter]}])
    one = shards(adam)
    assert one.updates == 0
    states = one.states(parameter)
    assert [(name, values.shape) for name, values in states.items()] == [
        (name, torch.Size([4])) for name in ("param", "exp_avg", "exp_avg_sq")
    ]
    states["exp_avg"].fill_(3.0)
    assert adam.state[parameter]["exp_avg"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    one.set_updates(5)
    assert one.updates == adam.param_groups[0]["step"] == 5
