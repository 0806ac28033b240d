"""The residual stream is fp32 everywhere: no stage, recomputation or message casts it down.

With alpha = 1024 an update is a thousandth of the stream, and bf16 would lose most of it. Every
sub-layer's update, as the next sub-layer (on the next stage, in the recomputed pass) sees it, is
held against the fp64 one from the same stream and branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.settings import settings
from tests.training.ranks import made_up_batches

ALPHA = 1024.0
EPS = 1e-5
LEAST_COSINE = 0.9999
BLOCKS = 8
# init_std so that branches have a size like those of a model 1024 wide (0.02 x 16^1/2).
SECTIONS = settings(
    model__blocks=BLOCKS,
    model__alpha=ALPHA,
    model__init_std=0.08,
    training__precision="bf16",
    training__global_batch_size=2,
    parallel__pipeline=2,
    parallel__virtual_pipeline=1,
    parallel__recompute="full",
)
# sub-layer -> its passes, forward and then recomputed: (x, branch, x_new)
Seen = dict[int, list[tuple[Tensor, Tensor, Tensor]]]


def cast_down(layer: nn.Module, when: Callable[[], bool]) -> None:
    """What a bf16 message or buffer would do to the stream that enters a block."""

    def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": x.bfloat16().to(x.dtype) if when() else x}

    layer.register_forward_pre_hook(hook, with_kwargs=True)


# Where to cast, as a fault: a block of the whole model and the pass.
FAULTS: dict[str, tuple[int, Callable[[], bool]] | None] = {
    "none": None,
    "within a stage": (3, lambda: True),
    "message between stages": (BLOCKS // 2, lambda: True),
    "recomputation": (2, torch.is_grad_enabled),
}


def record(fault: str) -> Seen:
    """One training step on this rank, under a fault; what its sub-layers saw."""
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    seen: Seen = {}
    config = RunConfig.model_validate(SECTIONS)
    with start(config.parallel, config.training) as runtime:
        chunks = build_model(config, runtime)
        for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
            layer.observer = lambda l, x, branch, _alpha, x_new: seen.setdefault(l, []).append(
                (x.detach(), branch.detach(), x_new.detach())
            )
            place = FAULTS[fault]
            if place is not None and layer.layer_number - 1 == place[0]:
                cast_down(layer, place[1])
        engine = MegatronEngine(config, runtime, chunks)
        batches = made_up_batches(config, runtime, 0)
        engine.train_step(batches, len(batches), 1e-3)
    return seen


def record_all(faults: list[str]) -> list[Seen]:
    return [record(fault) for fault in faults]


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    """What all sub-layers of both stages saw, by fault."""
    ranks = run_ranks(2, record_all, list(FAULTS))
    return {fault: {**first, **last} for fault, first, last in zip(FAULTS, *ranks, strict=True)}


def cosines(seen: Seen) -> list[float]:
    """Of every update from sub-layer 2 on, forward and recomputed."""
    found = []
    for l in range(2, 2 * BLOCKS - 1):
        assert len(seen[l]) == 2, "a forward pass and its recomputation"
        for here, after in zip(seen[l], seen[l + 1], strict=True):
            x, branch = here[0].double(), here[1].double()
            u = ALPHA * x + branch
            exact = u / (u.square().mean(-1, keepdim=True) + EPS).sqrt() - x
            realised = after[0].double() - x
            found.append(((realised * exact).sum() / realised.norm() / exact.norm()).item())
    return found


def test_every_update_arrives(seen: dict[str, Seen]) -> None:
    sound = seen["none"]
    assert sorted(sound) == list(range(2 * BLOCKS))
    for passes in sound.values():
        assert all(x.dtype == x_new.dtype == torch.float32 for x, _branch, x_new in passes)
        assert all(branch.dtype == torch.bfloat16 for _x, branch, _x_new in passes)
        for forward, again in zip(*passes, strict=True):
            assert torch.equal(forward, again), "the recomputed pass has other bits"
    for l in range(2 * BLOCKS - 1):
        assert torch.equal(sound[l][0][2], sound[l + 1][0][0]), f"changed on its way to {l + 1}"
    print(f"least cosine of {len(cosines(sound))} updates: {min(cosines(sound)):.7f}")
    assert min(cosines(sound)) >= LEAST_COSINE


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
def test_a_cast_anywhere_would_be_seen(seen: dict[str, Seen], fault: str) -> None:
    assert min(cosines(seen[fault])) < 0.9
