"""What the ranks of the test of ZeRO's memory run."""

from __future__ import annotations

import gc
from typing import Any

import torch

from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.distributed import start
from tests.training.ranks import made_up_batches


def held_bytes(runs: list[dict[str, dict[str, Any]]]) -> list[int]:
    """Bytes of all tensors of each run between the second step's passes and its update."""
    return [_held_bytes(sections) for sections in runs]


def _held_bytes(sections: dict[str, dict[str, Any]]) -> int:
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    gc.collect()
    before = _storages()
    with start(config.parallel, config.training) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        found: list[int] = []

        def look(_result: Any) -> bool:
            gc.collect()
            now = _storages()
            found.append(sum(size for place, size in now.items() if place not in before))
            return True

        for step in range(2):
            batches = made_up_batches(config, runtime, step)
            given = [t for b in batches for t in vars(b).values() if isinstance(t, torch.Tensor)]
            tokens = sum(t.nbytes for t in given)
            engine.train_step(batches, len(batches), config.optimizer.learning_rate, look)
        return found[-1] - tokens


def _storages() -> dict[int, int]:
    """Address and bytes of every tensor's storage in this process."""
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not isinstance(item, torch._subclasses.FakeTensor):
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None and tensor.device.type != "meta":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found
