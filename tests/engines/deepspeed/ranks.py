"""What the ranks of the DeepSpeed tests run, and the table of its runs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from keel_megatron.config.run import RunConfig
from keel_megatron.depth.profile import DepthProfile
from keel_megatron.runtime.distributed import start
from tests.training.ranks import made_up_batches

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"
)
CLIPPED: dict[str, Any] = {"optimizer__clip_grad": 0.25}
"""Gradient norms are about 0.55 here: every step is clipped."""
MEGATRON: dict[str, Any] = {**CLIPPED, "model__qk_norm": True, "training__z_loss": 1e-3}
"""What both engines train: with norms of heads and a z-loss."""


def zero(stage: int, *, offload: bool = False, parameters: bool = False) -> dict[str, Any]:
    """Overrides for a stage of ZeRO."""
    return {
        **CLIPPED,
        "training__engine": "deepspeed",
        "deepspeed__zero_stage": stage,
        "deepspeed__offload_optimizer": offload,
        "deepspeed__offload_parameters": parameters,
        "deepspeed__bucket_size": 20_000,  # several buckets, also in a small model
    }


ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 1": {**MEGATRON, **zero(1)},
    "ZeRO 1, optimizer offloaded": {**MEGATRON, **zero(1, offload=True)},
    "ZeRO 2": {**MEGATRON, **zero(2)},
    "ZeRO 2, optimizer offloaded": {**MEGATRON, **zero(2, offload=True)},
    "ZeRO 3": {**MEGATRON, **zero(3)},
    "ZeRO 3, optimizer offloaded": {**MEGATRON, **zero(3, offload=True)},
    "ZeRO 3, parameters offloaded too": {**MEGATRON, **zero(3, offload=True, parameters=True)},
}
# name -> (processes, overrides)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP 1": (1, {}),
    "DP 2": (2, {}),
    "TP 2": (2, {"parallel__tensor": 2}),
    "TP 2 x DP 2": (4, {"parallel__tensor": 2}),
}


@dataclass(frozen=True)
class Watched:
    """A run, seen from one rank."""

    steps: list[tuple[float, float]]
    """Loss and gradient norm; the last pair is the validation loss twice."""
    profile: DepthProfile
    """Of the last step."""
    places: list[float]
    """Gradient norm of the embedding, the blocks and the head in the last step."""


def watched_runs(
    runs: list[dict[str, dict[str, Any]]], steps: int, refused: int | None = None
) -> list[Watched]:
    """`watched` of several runs in the same processes."""
    return [watched(sections, steps, refused) for sections in runs]


def watched(sections: dict[str, dict[str, Any]], steps: int, refused: int | None = None) -> Watched:
    """Train some steps; before the one numbered `refused` another is refused."""
    from keel_megatron.depth.collector import DepthCollector
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.training.diagnose import gradient_norms

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        rate = config.optimizer.learning_rate
        found, places = [], []
        for step in range(steps):
            if step == refused:
                other = made_up_batches(config, runtime, 77)
                engine.train_step(other, len(other), rate, lambda _result: False)
            batches = made_up_batches(config, runtime, step)
            last = step == steps - 1
            depth = DepthCollector(engine) if last else None

            def accept(_result: Any, last: bool = last) -> bool:
                if last:
                    places.extend(gradient_norms(engine, config.model.blocks + 2))
                return True

            result = engine.train_step(batches, len(batches), rate, accept, depth)
            found.append((result.loss, result.grad_norm))
        assert depth is not None
        profile = depth.profile(steps)
        batches = made_up_batches(config, runtime, 99)
        loss = engine.validate(batches, len(batches))
        return Watched([*found, (loss, loss)], profile, places)


def forgetful(sections: dict[str, dict[str, Any]], steps: int) -> list[tuple[float, float]]:
    """Losses and norms if only the last micro-batch's gradients arrive."""
    from keel_megatron.engines.deepspeed.engine import DeepSpeedEngine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = DeepSpeedEngine(config, runtime, build_model(config, runtime))
        model = engine._model
        backward = model.backward

        def losing(loss: Any) -> Any:
            return backward(loss if model.is_gradient_accumulation_boundary() else 0.0 * loss)

        model.backward = losing
        found = []
        for step in range(steps):
            batches = made_up_batches(config, runtime, step)
            result = engine.train_step(batches, len(batches), config.optimizer.learning_rate)
            found.append((result.loss, result.grad_norm))
        return found


def own_reads(runs: list[dict[str, dict[str, Any]]]) -> list[list[str]]:
    """What this project's code reads of tensors in a second step, run by run."""
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model

    seen: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor) -> Any:
            if "keel_megatron" in sys._getframe(1).f_code.co_filename:
                seen.append(name)
            return real(tensor)

        return read

    found = []
    for sections in runs:
        config = RunConfig.model_validate(sections)
        with start(config.parallel, config.training) as runtime:
            engine = build_engine(config, runtime, build_model(config, runtime))
            batches = made_up_batches(config, runtime, 0)
            engine.train_step(batches, len(batches), 1e-3)
            with pytest.MonkeyPatch.context() as patch:
                for name in ("tolist", "item", "__float__", "__int__", "__bool__"):
                    patch.setattr(torch.Tensor, name, noted(name))
                engine.train_step(batches, len(batches), 1e-3)
        found.append(list(seen))
        seen.clear()
    return found
