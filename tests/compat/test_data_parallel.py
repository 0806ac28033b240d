"""DDP with one replica."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.settings import settings


class Seen(TorchDispatchMode):
    """Remembers the names of torch.distributed's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives.add(str(func))
        return func(*args, **(kwargs or {}))


def collectives(sections: dict[str, Any]) -> set[str]:
    """Names of the collectives of a training step."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start
    from tests.training.ranks import made_up_batches

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        batches = made_up_batches(config, runtime, 0)
        with Seen() as seen:
            engine.train_step(batches, len(batches), 1e-3)
        return seen.collectives


def test_one_replica_starts_no_collective() -> None:
    """None that moves gradients or parameters; the loss and the norm are still agreed upon."""
    sections = settings(model__blocks=1, parallel__distributed_optimizer=True)
    (alone,) = run_ranks(1, collectives, sections)
    both = run_ranks(2, collectives, sections)[0]
    moved = {name for name in both if "scatter" in name or "gather" in name}
    assert moved
    assert not moved & alone
