"""Compiled blocks against the plain ones: the same losses and gradients."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from keel_megatron.architecture.residual import RULES
from keel_megatron.compat import compile_cache
from keel_megatron.errors import UserError
from keel_megatron.model import compiled
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import needs_deepspeed
from tests.settings import settings, small_config
from tests.training.ranks import made_up_batches, train_steps

STEPS = 3


def compiled_and_plain(rule: str) -> dict[str, Any]:
    """Loss and gradients of 8 blocks both ways, and how many graphs dynamo made for them."""
    from torch._dynamo.utils import counters

    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = small_config(model__residual=rule, model__num_query_groups=2, kernels__compile=True)
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime)
        compiled.compile_blocks([chunk], runtime.device)
        batch = made_up_batches(config, runtime, 0)[0]
        found: dict[str, Any] = {}
        for way in ("compiled", "plain"):
            for layer in chunk.decoder.layers:
                layer.compiled = layer.compiled if way == "compiled" else None
            chunk.zero_grad()
            loss = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels).mean()
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in chunk.named_parameters()}
            found[way] = (loss.item(), gradients)
        found["said"] = [compiled.compile_report([chunk], 1.0) for _ in range(2)]
    found["graphs"] = counters["stats"]["unique_graphs"]
    return found


def kinds(rule: str, blocks: int = 8) -> int:
    """Kinds of blocks: each one's columns, and what stands in front of the next one's attention.

    Of a norm's factor it matters only whether there is one, and not to the attention: its norm
    belongs to the block before.
    """
    model = small_config(model__residual=rule, model__blocks=blocks).model
    rows = [compiled.COMPILED.sub_layer(l, model) for l in range(2 * blocks)]
    rows = [replace(row, inner_factor=float(row.inner_factor == 1.0)) for row in rows]
    attention = [replace(row, inner_factor=1.0) for row in rows[::2]]
    following = [(row.inner, row.inner_factor) for row in rows[2::2]] + [None]
    return len(set(zip(attention, rows[1::2], following, strict=True)))


@pytest.mark.skipif(" " in torch.__file__, reason="Inductor's linker calls do not quote paths")
@pytest.mark.parametrize(
    "rule", [pytest.param(rule, marks=[pytest.mark.slow] * (rule != "keel")) for rule in RULES]
)
def test_one_graph_serves_all_blocks_of_a_kind(rule: str) -> None:
    (found,) = run_ranks(1, compiled_and_plain, rule)
    graphs = kinds(rule)
    (loss, gradients), (expected, plain) = found["compiled"], found["plain"]
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in plain.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert found["graphs"] == graphs
    first, second = found["said"]
    assert f"{found['graphs']} graph(s)" in first
    assert second is None


def cache_misses(folder: Path) -> tuple[int, int]:
    """How many of a run's graphs, forward and backward, the cache had, and how many it had not."""
    from torch._dynamo.utils import counters

    os.environ["KEEL_CACHE"] = str(folder)
    os.environ.pop(compile_cache.INDUCTOR, None)
    train_steps(settings(kernels__compile=True), 1)
    autograd = counters["aot_autograd"]
    return autograd["autograd_cache_hit"], autograd["autograd_cache_miss"]


@pytest.mark.slow
def test_a_resumed_run_finds_what_was_compiled(tmp_path: Path) -> None:
    assert run_ranks(1, cache_misses, tmp_path) == [(0, 3)]
    assert (tmp_path / "compiled").is_dir()
    assert run_ranks(1, cache_misses, tmp_path) == [(3, 0)]


def both_ways(overrides: dict[str, Any], backend: str) -> list[list[tuple[float, float]]]:
    """The same steps compiled and not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        compiled = train_steps(settings(kernels__compile=True, **overrides), STEPS)
    return [compiled, train_steps(settings(**overrides), STEPS)]


@pytest.mark.parametrize(
    ("processes", "overrides", "backend"),
    [
        # As they were traced: the test above makes C++ of such graphs.
        (
            2,
            {
                "parallel__pipeline": 2,
                "parallel__virtual_pipeline": 2,
                "model__qk_norm": True,
                "training__z_loss": 1e-2,
                "optimizer__name": "muon",
            },
            "aot_eager",
        ),
        *(
            pytest.param(*case, "inductor", marks=pytest.mark.slow)
            for case in (
                (1, {"parallel__recompute": "full"}),
                (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
                (2, {"training__precision": "bf16"}),
            )
        ),
        pytest.param(
            1,
            {"training__engine": "deepspeed", "deepspeed__zero_stage": 2},
            "inductor",
            marks=[needs_deepspeed, pytest.mark.slow],
        ),
    ],
)
def test_layouts_and_recomputation_train_alike(
    processes: int, overrides: dict[str, Any], backend: str
) -> None:
    losses = run_ranks(processes, both_ways, overrides, backend)[0]
    bound = 1e-5 if "training__precision" not in overrides else 2e-3
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=bound)


def test_no_compiler_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"kernels.compile: .* there is no no-such-compiler"):
        compiled.require_compiler("cpu")
    monkeypatch.setattr(compiled, "triton_is_installed", lambda: False)
    with pytest.raises(UserError, match=r"kernels.compile: .*Triton"):
        compiled.require_compiler("cuda")


def with_a_broken_compiler() -> str:
    """What a compiler that is there and fails comes to."""
    from torch._inductor import config

    config.cpp.cxx, config.force_disable_caches = ("false",), True
    try:
        compiled_and_plain("keel")
    except UserError as error:
        return str(error)
    return "it compiled"


def test_a_compiler_that_fails_is_one_message() -> None:
    (said,) = run_ranks(1, with_a_broken_compiler)
    assert "kernels.compile: torch.compile fails (" in said
    assert "set it to false" in said
