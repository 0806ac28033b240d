"""`parallel.recompute: light` against `none`: the same losses and gradients, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keel_megatron.architecture.residual import RULES
from keel_megatron.config.checks import problems
from keel_megatron.model.recompute import free_until_backward
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import needs_deepspeed
from tests.settings import settings, small_config
from tests.training.ranks import made_up_batches, train_steps

LIGHT = {"parallel__recompute": "light"}
RULE_CASES: list[dict[str, Any]] = [
    {"model__residual": rule, "training__precision": precision, "model__num_query_groups": 2}
    for rule in RULES
    for precision in ("fp32", "bf16")
] + [
    {"model__dropout": 0.1},
    {"model__qk_norm": True},
    {"training__precision": "bf16", "kernel": "triton"},
]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor, sequence and pipeline": (
        4,
        {
            "parallel__tensor": 2,
            "parallel__sequence": True,
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "training__precision": "bf16",
        },
    ),
    "tensor": (2, {"parallel__tensor": 2}),
}


def freed(sections: dict[str, Any]) -> tuple[int, float, dict[str, torch.Tensor]]:
    """Blocks that free something, and loss and gradients of one micro-batch."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime)
        batch = made_up_batches(config, runtime, 0)[0]
        torch.manual_seed(1)
        loss = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels).mean()
        loss.backward()
        gradients = {name: p.grad for name, p in chunk.named_parameters()}
        light = sum(layer.mlp.light for layer in chunk.decoder.layers)
        return light, loss.item(), gradients


def both_ways(cases: list[dict[str, Any]]) -> list[Any]:
    """Each case with and without light recomputation."""
    from functools import partial

    from keel_megatron.kernels import scaled_add_norm, swiglu
    from keel_megatron.model import layer, mlp

    found = []
    for case in cases:
        overrides = {"model__blocks": 5, **case}
        backend = overrides.pop("kernel", "auto")
        layer.scaled_add_norm = partial(scaled_add_norm, backend=backend)
        mlp.swiglu = partial(swiglu.swiglu, backend=backend)
        found.append([freed(settings(**overrides, **way)) for way in (LIGHT, {})])
    return found


def test_every_rule_trains_with_the_same_bits() -> None:
    (found,) = run_ranks(1, both_ways, RULE_CASES)
    for case, (light, plain) in zip(RULE_CASES, found, strict=True):
        assert (light[0], plain[0]) == (5, 0), case
        assert light[1] == plain[1], case
        for name, gradient in plain[2].items():
            assert torch.equal(light[2][name], gradient), (case, name)


def steps_both_ways(overrides: dict[str, Any]) -> list[list[tuple[float, float]]]:
    return [train_steps(settings(**overrides, **way), 2) for way in (LIGHT, {})]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_with_the_same_bits(name: str) -> None:
    processes, overrides = LAYOUTS[name]
    light, plain = run_ranks(processes, steps_both_ways, overrides)[0]
    assert light == plain


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_trains_with_the_same_bits(stage: int) -> None:
    overrides = {"training__engine": "deepspeed", "deepspeed__zero_stage": stage}
    light, plain = run_ranks(1, steps_both_ways, overrides)[0]
    assert light == plain


def test_memory_is_freed_until_the_gradient_comes() -> None:
    from keel_megatron.kernels.swiglu import swiglu

    torch.manual_seed(0)
    gate_up = torch.randn(3, 8, requires_grad=True)
    product = swiglu(gate_up)
    weight = torch.randn(5, 4, requires_grad=True)
    expected = torch.autograd.grad((swiglu(gate_up) @ weight.t()).sum(), [gate_up, weight])
    out = product @ weight.t()
    free_until_backward(product, out)
    assert product.untyped_storage().nbytes() == 0
    found = torch.autograd.grad(out.sum(), [gate_up, weight])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_nothing_can_compute_again_stays() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    kept = x * 2
    free_until_backward(kept, kept.sum())
    free_until_backward(x, x.sum())
    assert kept.untyped_storage().nbytes() == x.untyped_storage().nbytes() == 48


def test_the_stream_is_never_freed() -> None:
    """It is an output of the same function as the branch's input."""
    from keel_megatron.kernels import scaled_add_norm

    x, f = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    x_new, z = scaled_add_norm(x, f, 1.0, None, torch.ones(4), 1e-5, torch.float32)
    free_until_backward(x_new, x_new.sum())
    assert x_new.untyped_storage().nbytes() == 48
    assert z is not None
    free_until_backward(z, z.sum())
    assert z.untyped_storage().nbytes() == 0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"kernels__compile": True}, "kernels.compile"),
        ({"kernels__backend": "transformer_engine"}, "transformer_engine"),
    ],
)
def test_what_keeps_its_own_choice_is_refused(overrides: dict[str, Any], reason: str) -> None:
    assert reason in dict(problems(small_config(**overrides, **LIGHT)))["parallel.recompute"]
    assert not dict(problems(small_config(**overrides, parallel__recompute="auto")))
