"""torch's AdamW inside Megatron-core's optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keel_megatron.compat import adamw
from tests.distributed import run_ranks
from tests.settings import settings


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


def described(sections: dict[str, Any]) -> tuple[bool, int, int]:
    """Whether Megatron-core alone fails; entries with the patch; parameters."""
    from keel_megatron.checkpoint.megatron_state import content_metadata
    from keel_megatron.checkpoint.optimizer_state import sharded_optimizer_state
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        metadata = content_metadata()
        models = engine.chunks[0].sharded_state_dict(metadata=metadata)
        alone_fails = False
        try:
            engine.optimizer.sharded_state_dict(models, metadata=metadata)
        except Exception:
            alone_fails = True
        state = sharded_optimizer_state(engine.optimizer, models, metadata, is_loading=False)
        moments = state["optimizer"]["state"]
        return alone_fails, len(moments), len(list(engine.chunks[0].parameters()))


def test_fp32_parameters_of_a_bf16_model_are_described() -> None:
    sections = settings(
        model__blocks=1, training__precision="bf16", parallel__distributed_optimizer=False
    )
    ((alone_fails, entries, parameters),) = run_ranks(1, described, sections)
    assert entries == parameters
    assert alone_fails  # or the patch is not needed any more


def test_groups_are_recognised_by_their_decay() -> None:
    """A changed learning rate, and a group of an Adam that knows no `max_lr`."""
    own = [{"wd_mult": 1.0, "max_lr": 2e-3, "eps": 1e-8}, {"wd_mult": 0.0, "max_lr": 2e-3}]
    loaded = [{"wd_mult": 0.0, "step": 4, "params": [1]}, {"wd_mult": 1.0, "max_lr": 1e-3}]
    adamw.identify_groups(loaded, own)
    assert loaded[0] == {"wd_mult": 0.0, "max_lr": 2e-3, "step": 4, "params": [1]}
    assert loaded[1] == own[0]


def test_every_parameter_counts_its_own_steps() -> None:
    """As Megatron-core's distributed optimizer would leave them: all with one counter."""
    shared = torch.tensor(3.0)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    adam = torch.optim.AdamW(parameters)
    for parameter in parameters:
        adam.state[parameter] = {"step": shared, "exp_avg": torch.zeros(2)}

    class Inner:
        optimizer = adam

        def load_parameter_state_from_fully_reshardable(self, sharded: dict[str, Any]) -> None:
            for state in adam.state.values():
                assert state.keys() == sharded.keys()  # no step: it is not among the tensors
                state.update(sharded)

    adamw.load_parameter_state(Inner(), {"exp_avg": torch.ones(2)})
    first, second = (adam.state[parameter]["step"] for parameter in parameters)
    first += 1
    assert (first.item(), second.item()) == (4.0, 3.0)
    assert adam.state[parameters[0]]["exp_avg"].tolist() == pytest.approx([1.0, 1.0])
