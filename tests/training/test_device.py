"""A step in bf16 on the device against fp64 on the CPU, for every residual rule.

The CUDA half runs with `make test-gpu`; the CPU half keeps it honest where there is no GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from keel_megatron.architecture.residual import RULES
from tests.distributed import run_ranks
from tests.settings import settings
from tests.training.ranks import observed_steps
from tests.training.steps import Tensors, device_steps, exact_steps

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
NEEDS_TE = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a CUDA device and Transformer Engine",
)
RATE = 1e-3


def sections_of(rule: str, **overrides: Any) -> dict[str, dict[str, Any]]:
    return settings(
        model__residual=rule,
        model__init_std=0.05,
        model__num_query_groups=2,
        training__precision="bf16",
        training__global_batch_size=2,
        optimizer__learning_rate=RATE,
        **overrides,
    )


@pytest.fixture(scope="module")
def exact() -> dict[str, tuple[Tensors, float, Tensors]]:
    """Of every rule the initial weights, and the fp64 loss and gradients from them."""
    return dict(
        zip(RULES, run_ranks(1, exact_steps, list(map(sections_of, RULES)))[0], strict=True)
    )


def cosine(found: Tensors, expected: Tensors) -> float:
    ours = torch.cat([found[name].flatten().double() for name in expected])
    theirs = torch.cat([gradient.flatten() for gradient in expected.values()])
    return ((ours @ theirs) / ours.norm() / theirs.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
def test_a_bf16_step_is_near_the_exact_one(
    exact: dict[str, tuple[Tensors, float, Tensors]], device: str
) -> None:
    runs = [(sections_of(rule), exact[rule][0]) for rule in RULES]
    found = run_ranks(1, device_steps, runs, device)[0]
    for rule, (our_loss, ours, updated) in zip(RULES, found, strict=True):
        weights, loss, gradients = exact[rule]
        near = cosine(ours, gradients)
        print(f"{rule:20} on {device}: loss {our_loss / loss - 1:+.1e}, cosine {near:.6f}")
        assert our_loss == pytest.approx(loss, rel=1e-3)
        assert near > 0.9995
        assert_one_step(weights, gradients, updated)


def assert_one_step(weights: Tensors, gradients: Tensors, updated: Tensors) -> None:
    """Adam's first step is the gradient's sign times the rate; bf16 weights round it."""
    for name, weight in weights.items():
        step = updated[name] - weight * (1 - 0.01 * RATE if weight.dim() > 1 else 1)
        assert torch.isfinite(updated[name]).all()
        assert step.abs().max() <= RATE * 1.01 + weight.abs().max() * 2.0**-8, name
        large = gradients[name].abs() > 0.5 * gradients[name].square().mean().sqrt()
        same = (step.sign() == -gradients[name].sign())[large].double().mean()
        assert same > (0.97 if weight.dim() == 1 else 0.55), name


@pytest.mark.gpu
@NEEDS_TE
def test_transformer_engines_modules_behave_alike(
    exact: dict[str, tuple[Tensors, float, Tensors]],
) -> None:
    runs = [
        (sections_of(rule, kernels__backend="transformer_engine"), exact[rule][0]) for rule in RULES
    ]
    for rule, (_loss, ours, _updated) in zip(
        RULES, run_ranks(1, device_steps, runs, "cuda")[0], strict=True
    ):
        assert cosine(ours, exact[rule][2]) > 0.9995, rule


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernels__cuda_graphs": True},
        {"kernels__compile": True},
        {"kernels__cuda_graphs": True, "kernels__compile": True},
        pytest.param({"kernels__backend": "transformer_engine"}, marks=NEEDS_TE),
    ],
)
def test_other_kernels_train_alike(options: dict[str, Any], optimizer: str) -> None:
    """Compiled, recorded and other modules, through steps that are observed and a validation."""
    common = {"training__device": "cuda", "training__micro_batch_size": 1}
    runs = [
        sections_of("keel", **common, **switched, optimizer__name=optimizer)
        for switched in (options, {})
    ]
    found, expected = (run_ranks(1, observed_steps, run, 6)[0] for run in runs)
    for (loss, norm), (plain_loss, plain_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(plain_loss, rel=2e-3)
        assert norm == pytest.approx(plain_norm, rel=2e-2)
