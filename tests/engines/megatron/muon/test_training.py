"""Whole steps of training with Muon, against an independent model and optimizers in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.engines.megatron.muon.reference import Muon
from tests.model.test_exactness import pair_up, shape_of
from tests.reference_model import ReferenceModel
from tests.settings import settings
from tests.training.ranks import made_up_batches

STEPS = 3
RATE, DECAY, CLIP = 1e-2, 0.5, 0.25
SMALL: dict[str, Any] = {
    "model__blocks": 2,
    "model__hidden_size": 32,
    "model__ffn_hidden_size": 48,
    "model__num_query_groups": 2,
    "data__seq_length": 16,
    "data__vocab_size": 320,
    "training__global_batch_size": 4,
    "optimizer__name": "muon",
    "optimizer__learning_rate": RATE,
    "optimizer__weight_decay": DECAY,
    "optimizer__clip_grad": CLIP,
}
RUNS: dict[str, dict[str, Any]] = {
    "nesterov": {},
    "plain": {
        "optimizer__nesterov": False,
        "optimizer__momentum": 0.8,
        "optimizer__ns_steps": 3,
        "optimizer__adjust_lr_fn": "original",
    },
}


class AdamW:
    """Of one tensor, from its equations, in fp64; as `reference.Muon`."""

    def __init__(self, matrix: Tensor, *, decay: float) -> None:
        self.matrix, self.decay = matrix.double(), decay
        self.first, self.second = torch.zeros(2, *matrix.shape, dtype=torch.float64)
        self.count = 0

    def step(self, gradient: Tensor) -> None:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.95 * self.second + 0.05 * gradient**2
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.95**self.count)
        moved = first / (second.sqrt() + 1e-8)
        self.matrix = (1 - RATE * self.decay) * self.matrix - RATE * moved


def both(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run the largest errors of its losses, gradient norms and weights."""
    return [compared(RunConfig.model_validate(sections)) for sections in runs]


def compared(config: RunConfig) -> dict[str, Any]:
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    with start(config.parallel, config.training) as runtime:
        engine: Any = build_engine(config, runtime, build_model(config, runtime))
        (package,) = engine.chunks
        reference = ReferenceModel(shape_of(config)).double()
        pairs = list(pair_up(package, reference))
        with torch.no_grad():
            for _name, ours, theirs in pairs:
                theirs.copy_(ours)
        begun = [theirs.detach().clone() for _name, _ours, theirs in pairs]
        rules = [optimizer(name, theirs.detach(), config) for name, _ours, theirs in pairs]
        errors: dict[str, Any] = {"loss": 0.0, "grad_norm": 0.0}
        for step in range(STEPS):
            batches = made_up_batches(config, runtime, step)
            result = engine.train_step(batches, len(batches), RATE)
            loss, norm = plain_step(reference, [one for _n, _o, one in pairs], rules, batches)
            errors["loss"] = max(errors["loss"], abs(result.loss / loss - 1))
            errors["grad_norm"] = max(errors["grad_norm"], abs(result.grad_norm / norm - 1))
        for (name, ours, _), theirs, start_ in zip(
            pair_up(package, reference), (rule.matrix for rule in rules), begun, strict=True
        ):
            errors[name] = float((ours.double() - theirs).norm() / (theirs - start_).norm())
        return errors


def optimizer(name: str, values: Tensor, config: RunConfig) -> Any:
    """Muon for the blocks' matrices, AdamW for the rest; norm weights do not decay."""
    if not (name.startswith("blocks.") and values.dim() == 2):
        return AdamW(values, decay=DECAY if values.dim() == 2 else 0.0)
    chosen = config.optimizer
    return Muon(
        values,
        lr=RATE,
        weight_decay=DECAY,
        momentum=chosen.momentum,
        nesterov=chosen.nesterov,
        steps=chosen.ns_steps,
        match=chosen.adjust_lr_fn == "match_rms_adamw",
    )


def plain_step(
    reference: ReferenceModel, parameters: list[Tensor], rules: list[Any], batches: list[Any]
) -> tuple[float, float]:
    """Loss and gradient norm of the whole global batch; then a clipped update."""
    tokens = torch.cat([batch.tokens for batch in batches])
    loss = reference(tokens, torch.cat([batch.labels for batch in batches]))
    gradients = torch.autograd.grad(loss, parameters)
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    with torch.no_grad():
        for parameter, rule, gradient in zip(parameters, rules, gradients, strict=True):
            rule.step(gradient * min(1.0, CLIP / norm))
            parameter.copy_(rule.matrix)
    return float(loss.detach()), norm


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, Any]]:
    (found,) = run_ranks(1, both, [settings(**SMALL, **overrides) for overrides in RUNS.values()])
    return dict(zip(RUNS, found, strict=True))


@pytest.mark.parametrize("run", RUNS)
def test_steps_equal_an_independent_model_and_optimizers(
    run: str, errors: dict[str, dict[str, Any]]
) -> None:
    """Losses and norms of three clipped steps; of every weight the way that it went.

    Newton-Schulz enlarges small singular values up to 500 times in five steps, and with them the
    rounding of fp32 in gradients.
    """
    found = dict(errors[run])
    assert found.pop("loss") < 1e-6
    assert found.pop("grad_norm") < 1e-5
    assert len(found) > 2 * 7
    assert max(found.values()) < 1e-3, found
