"""How often a step waits for its device: values that Python reads from tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.settings import settings


class Reads(TorchDispatchMode):
    """Notes the operators that give Python a value, and how many values there are.

    `tolist` reads a CPU tensor without an operator, and so is counted by its own name.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        real = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            self.seen.append(f"tolist of {tensor.numel()}")
            with torch._C._DisableTorchDispatch():
                return real(tensor)

        patch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def waits(sections: dict[str, Any]) -> list[str]:
    """What the second step of a loop reads, rank by rank."""
    from keel_megatron.data.batches import Batches
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start
    from keel_megatron.training.guard import Guard
    from keel_megatron.training.loop import Loop
    from keel_megatron.training.run_state import RunState
    from keel_megatron.training.stop import StopRequest
    from tests.checkpoint.ranks import MadeUp
    from tests.training.fakes import FakeSaver, FakeTracker

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime, pytest.MonkeyPatch.context() as patch:
        engine = build_engine(config, runtime, build_model(config, runtime))
        guard = Guard(config.guard)
        loop = Loop(
            engine=engine,
            batches=Batches(MadeUp(config, runtime), []),  # type: ignore[arg-type]
            state=RunState(engine, FakeSaver(), {}),  # type: ignore[arg-type]
            guard=guard,
            tracker=FakeTracker(),  # type: ignore[arg-type]
        )
        loop._step(StopRequest())
        with Reads(patch) as reads:
            loop._step(StopRequest())
        return reads.seen


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, {}),
        (2, {"parallel__pipeline": 2, "optimizer__clip_grad": 1e-3}),
        (2, {"training__precision": "bf16", "parallel__distributed_optimizer": False}),
        (2, {"optimizer__name": "muon", "optimizer__clip_grad": 1e-3}),
    ],
    ids=["alone", "two stages", "two replicas", "two replicas, Muon"],
)
def test_a_step_waits_for_its_device_once(size: int, overrides: dict[str, Any]) -> None:
    """Loss, gradient norm and the request to stop are read together."""
    sections = settings(model__blocks=2, **overrides)
    assert run_ranks(size, waits, sections) == [["tolist of 3"]] * size
