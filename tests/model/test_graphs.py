"""Blocks in CUDA graphs against the plain ones, with a stand-in for CUDA's recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.errors import UserError
from tests.distributed import run_ranks
from tests.settings import settings, small_config
from tests.training.ranks import observed_steps


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


@pytest.mark.parametrize(
    "options",
    [
        {"parallel__recompute": "none"},
        {"parallel__recompute": "light"},
        {"optimizer__name": "muon", "model__residual": "hyper_connections"},
    ],
    ids=["none", "light", "Muon, streams"],
)
def test_recorded_blocks_train_like_plain_ones(options: dict[str, Any]) -> None:
    """All but CUDA itself: every gradient leaves by the arguments, observed steps run plainly."""
    sections = settings(
        training__precision="bf16",
        training__device="auto",
        model__blocks=3,
        **options,
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


@pytest.mark.parametrize(("graphs", "device"), [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_ddps_hooks_are_made_in_a_side_stream(
    monkeypatch: pytest.MonkeyPatch, graphs: bool, device: str
) -> None:
    """CUDA refuses a capture whose gradient accumulators are on the default stream.

    A stand-in for CUDA's streams records where DDP, which makes the accumulators, is built.
    """
    from keel_megatron.engines.megatron import optimizer

    events: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    current = [Stream("default")]

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def ddp(*_: Any) -> None:
        events.append(f"DDP on {current[-1].name}")

    warn = "set_warn_on_accumulate_grad_stream_mismatch"
    monkeypatch.setattr(torch.autograd.graph, warn, lambda _: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(optimizer, "OverlappedDataParallel", ddp)
    monkeypatch.setattr(optimizer.data_parallel, "leave_out_collectives_of_one", lambda _: None)
    config = small_config(
        training__precision="bf16", training__device="auto", kernels__cuda_graphs=graphs
    )
    runtime: Any = SimpleNamespace(device=torch.device(device), data_size=1)
    chunk: Any = SimpleNamespace(config=None)
    optimizer.wrap_data_parallel(config, [chunk], runtime)
    plain = ["DDP on default"]
    aside = ["side waits for default", "DDP on side", "default waits for side"]
    assert events == (aside if graphs and device == "cuda" else plain)
