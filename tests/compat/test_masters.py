"""Copies of masters to weights."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.settings import settings


class Copies(TorchDispatchMode):
    """Counts the copies, of one tensor each and of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.single = 0
        self.lists: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::copy_":
            self.single += 1
        if func.name() == "aten::_foreach_copy_":
            self.lists.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def copied(sections: dict[str, Any]) -> tuple[int, list[int], int, bool]:
    """Single copies, lengths of copied lists, matrices, and whether Megatron-core's agree."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        (inner,) = engine.optimizer.chained_optimizers
        parameters = list(engine.chunks[0].parameters())
        # The masters change; Megatron-core's own copy says what the weights are then.
        masters = [p for group in inner.optimizer.param_groups for p in group["params"]]
        for master in masters:
            master.data.mul_(1.5)
        with Copies() as seen:
            inner._copy_main_params_to_model_params()
        ours = [p.detach().clone() for p in parameters]
        type(inner)._copy_main_params_to_model_params(inner)
        same = all(p.equal(mine) for p, mine in zip(parameters, ours, strict=True))
        matrices = sum(p.dim() > 1 for p in parameters)
        return seen.single, seen.lists, matrices, same


@pytest.mark.parametrize("distributed", [True, False])
def test_masters_are_copied_in_one_call(distributed: bool) -> None:
    """The fp32 norm weights, which are their own masters, are not copied."""
    sections = settings(
        model__blocks=2,
        training__precision="bf16",
        parallel__distributed_optimizer=distributed,
    )
    ((single, lists, matrices, same),) = run_ranks(1, copied, sections)
    assert (single, lists) == (0, [matrices])
    assert same


def test_fp32_weights_are_their_own_masters() -> None:
    ((single, lists, _matrices, same),) = run_ranks(
        1, copied, settings(model__blocks=1, training__precision="fp32")
    )
    assert (single, lists, same) == (0, [], True)
