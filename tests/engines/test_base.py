"""Document masks and the loss over the tokens that count: the same at every layout and engine."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from keel_megatron.engines.base import mean_counted, mean_loss
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import Watched, watched_runs, zero
from tests.settings import settings
from tests.training.ranks import made_up_batches

DOCUMENTS: dict[str, Any] = {
    "model__blocks": 4,
    "model__num_query_groups": 2,
    "data__document_masks": True,
    "training__global_batch_size": 8,
    "optimizer__clip_grad": 0.25,
}
PP2 = {"parallel__pipeline": 2}
ALONE: dict[str, dict[str, Any]] = {
    "one micro-batch": {"training__micro_batch_size": 8},
    "micro-batches of 2": {},
    "micro-batches of 1, recomputed": {
        "training__micro_batch_size": 1,
        "parallel__recompute": "full",
    },
}
TWO: dict[str, dict[str, Any]] = {
    "DP 2": {"training__micro_batch_size": 1},
    "PP 2 x VPP 2": {**PP2, "parallel__virtual_pipeline": 2},
    "PP 2, recomputed": {**PP2, "parallel__recompute": "full"},
    "TP 2": {"parallel__tensor": 2},
    "TP 2 + SP": {"parallel__tensor": 2, "parallel__sequence": True},
}
if importlib.util.find_spec("deepspeed") is not None:
    ALONE["ZeRO 2, micro-batches of 4"] = {**zero(2), "training__micro_batch_size": 4}
    TWO["ZeRO 3, DP 2"] = {**zero(3), "training__micro_batch_size": 1}
EXPECTED = "one micro-batch"


def _trained(size: int, runs: dict[str, dict[str, Any]]) -> dict[str, Watched]:
    sections = [settings(**{**DOCUMENTS, **overrides}) for overrides in runs.values()]
    return dict(zip(runs, run_ranks(size, watched_runs, sections, 2)[0], strict=True))


@pytest.fixture(scope="module")
def found() -> dict[str, Watched]:
    return {**_trained(1, ALONE), **_trained(2, TWO)}


@pytest.mark.parametrize("layout", [name for name in (*ALONE, *TWO) if name != EXPECTED])
def test_every_layout_trains_like_one_micro_batch(layout: str, found: dict[str, Watched]) -> None:
    """Losses, gradient norms, the validation loss, and the largest logits within documents."""
    for here, there in zip(found[layout].steps, found[EXPECTED].steps, strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    logits = [found[name].profile.values["attention_logit_max"] for name in (layout, EXPECTED)]
    assert logits[0].compressed() == pytest.approx(logits[1].compressed(), rel=1e-4)


def test_the_first_loss_is_the_mean_of_the_counted_tokens(found: dict[str, Watched]) -> None:
    (expected,) = run_ranks(1, _first_loss, settings(**DOCUMENTS))
    assert found[EXPECTED].steps[0][0] == pytest.approx(expected, rel=1e-6)


def _first_loss(sections: dict[str, dict[str, Any]]) -> float:
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.base import forward
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime, torch.no_grad():
        (chunk,) = build_model(config, runtime)
        losses, masks = [], []
        for batch in made_up_batches(config, runtime, 0):
            assert batch.loss_mask is not None
            losses.append(forward(chunk, batch))
            masks.append(batch.loss_mask > 0)
        counted = torch.cat(losses)[torch.cat(masks)]
        assert 0 < counted.numel() < torch.cat(masks).numel()
        return float(counted.double().mean())


def test_without_masks_the_loss_is_the_plain_mean() -> None:
    """To the bit, and without a collective."""
    losses = torch.randn(3, 5)
    assert mean_counted([], None) is None  # type: ignore[arg-type]
    assert torch.equal(mean_loss(losses, None, None), losses.sum() / 15)


def test_a_micro_batch_without_counted_tokens_adds_nothing() -> None:
    losses = torch.randn(2, 4, requires_grad=True)
    loss = mean_loss(losses, torch.zeros(2, 4), torch.tensor(3.0))
    loss.backward()
    assert loss == 0.0
    assert losses.grad is not None
    assert not losses.grad.any()
