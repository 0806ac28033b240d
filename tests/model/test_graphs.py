"""Blocks in CUDA graphs against the plain ones, with a stand-in for CUDA's recorder."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.errors import UserError
from tests.distributed import run_ranks
from tests.settings import settings
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
