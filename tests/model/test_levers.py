"""Compiled and recorded blocks against the plain ones: the same losses and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.architecture.residual import RULES
from keel_megatron.compat import compile_cache
from keel_megatron.config.checks import problems
from keel_megatron.errors import UserError
from keel_megatron.model import compiled
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import needs_deepspeed
from tests.settings import settings, small_config
from tests.training.ranks import made_up_batches, observed_steps, train_steps

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
    """Kinds of blocks: each one's columns, and what stands in front of the next one's attention."""
    model = small_config(model__residual=rule, model__blocks=blocks).model
    rows = [compiled.COMPILED.sub_layer(l, model) for l in range(2 * blocks)]
    following = [row.inner for row in rows[2::2]] + [None]
    return len(set(zip(rows[::2], rows[1::2], following, strict=True)))


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
    assert found["graphs"] <= graphs
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
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, "aot_eager"),
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


@pytest.mark.parametrize(
    ("switch", "overrides", "path"),
    [
        ("compile", {"parallel__tensor": 2}, "parallel.tensor"),
        ("compile", {"kernels__backend": "transformer_engine"}, "kernels.backend"),
        ("compile", {"model__dropout": 0.1}, "model.dropout"),
        (
            "compile",
            {"training__engine": "deepspeed", "deepspeed__zero_stage": 3},
            "deepspeed.zero_stage",
        ),
        ("cuda_graphs", {"training__device": "cpu"}, "training.device"),
        ("cuda_graphs", {"training__engine": "deepspeed"}, "training.engine"),
        ("cuda_graphs", {"training__precision": "fp32"}, "training.precision"),
        ("cuda_graphs", {"parallel__tensor": 2}, "parallel.tensor"),
        ("cuda_graphs", {"parallel__pipeline": 2}, "parallel.pipeline"),
        ("cuda_graphs", {"parallel__recompute": "full"}, "parallel.recompute"),
        ("cuda_graphs", {"kernels__backend": "apex"}, "kernels.backend"),
        ("cuda_graphs", {"model__dropout": 0.1}, "model.dropout"),
        ("cuda_graphs", {"data__document_masks": True}, "data.document_masks"),
    ],
)
def test_what_does_not_go_together_is_refused(
    switch: str, overrides: dict[str, Any], path: str
) -> None:
    fitting = {"training__device": "auto", "training__precision": "bf16"}
    config = small_config(**{f"kernels__{switch}": True, **fitting, **overrides})
    found = dict(problems(config))
    assert f"kernels.{switch}" in found[path]
    assert len(found) == 1
    assert not dict(problems(small_config(**{f"kernels__{switch}": True, **fitting})))


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


def graphed_and_plain(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Observed steps with blocks recorded by a stand-in for CUDA's recorder, and without."""
    from keel_megatron.engines import build
    from keel_megatron.model import graphs

    recorded = []

    def record(function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> Any:
        recorded.append(function)
        return stand_in(function, arguments)

    def on_any_device(chunks: Any, _device: torch.device) -> None:
        graphs.record_blocks(chunks, torch.device("cuda"))

    torch.cuda.make_graphed_callables = record
    build.record_blocks = on_any_device
    found: dict[str, Any] = {}
    for switch in (True, False):
        sections["kernels"] = {"cuda_graphs": switch}
        found["graphed" if switch else "plain"] = observed_steps(sections, 6)
    return found | {"recorded": len(recorded)}


def stand_in(function: Callable[..., Any], arguments: tuple[torch.Tensor, ...]) -> Any:
    """The contract of torch.cuda.make_graphed_callables, computed again in place of replayed.

    What it records are these very arguments; a call copies into them, returns detached results, and
    gives gradients to these arguments alone.
    """

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            for static, given in zip(arguments, inputs, strict=True):
                if static.data_ptr() != given.data_ptr():
                    static.data.copy_(given)
            with torch.enable_grad():
                ctx.result = function(*arguments)
            return ctx.result.detach()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            wanted = [one for one in arguments if one.requires_grad]
            found = iter(torch.autograd.grad(ctx.result, wanted, gradient))
            return tuple(next(found) if one.requires_grad else None for one in arguments)

    return Graphed.apply


@pytest.mark.parametrize("recompute", ["none", "light"])
def test_recorded_blocks_train_like_plain_ones(recompute: str) -> None:
    """All but CUDA itself: every gradient leaves by the arguments, observed steps run plainly."""
    sections = settings(
        training__precision="bf16",
        training__device="auto",
        model__blocks=3,
        parallel__recompute=recompute,
    )
    (found,) = run_ranks(1, graphed_and_plain, sections)
    assert found["graphed"] == found["plain"]
    assert found["recorded"] == 2  # at step 2, and again after the observed step 4


def test_a_cpu_has_no_graphs() -> None:
    from keel_megatron.model.graphs import record_blocks

    with pytest.raises(UserError, match=r"kernels.cuda_graphs: true needs a CUDA device"):
        record_blocks([], torch.device("cpu"))


def test_what_is_computed_again_is_not_recorded() -> None:
    from keel_megatron.model.graphs import record_blocks

    chunk: Any = torch.nn.Module()
    chunk.config = SimpleNamespace(recompute_num_layers=3)
    with pytest.raises(UserError, match=r"recompute: auto recomputes 3 block"):
        record_blocks([chunk], torch.device("cuda"))
