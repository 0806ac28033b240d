"""Host copies of a save: whose values they have, whose memory, and what waits for them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.checkpoint import staging
from keel_megatron.checkpoint.staging import Staging
from tests.checkpoint.state_ranks import order_of_a_step
from tests.distributed import run_ranks
from tests.settings import settings

TENSORS = [torch.arange(5.0), torch.arange(3, dtype=torch.int64), torch.ones(7, dtype=torch.int8)]


@pytest.mark.parametrize("slab_bytes", [0, 64, 1 << 10])
def test_copies_keep_their_values_and_the_memory_is_used_again(
    slab_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SLAB_BYTES", slab_bytes)
    place = Staging(torch.device("cpu"))
    place._is_cuda = bool(slab_bytes)  # packed, as on CUDA
    monkeypatch.setattr(torch, "empty", unpinned(torch.empty))
    place._space(TENSORS)
    place._is_cuda = False
    sources = [tensor.clone() for tensor in TENSORS]
    first = place.copy(sources)
    for source in sources:
        source.zero_()
    assert all(map(torch.equal, first, TENSORS))
    second = place.copy(sources)
    assert [t.data_ptr() for t in second] == [t.data_ptr() for t in first]
    assert not any(tensor.any() for tensor in second)
    place.wait()
    place.ready()


def unpinned(empty: Any) -> Any:
    def plain(*arguments: Any, pin_memory: bool = False, **keywords: Any) -> Any:
        return empty(*arguments, **keywords)

    return plain


def test_on_cuda_a_stream_copies_and_the_update_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for streams and events, which say in which order they are called."""
    calls: list[str] = []

    @contextmanager
    def inside(stream: Any) -> Any:
        calls.append(f"within {stream.name}")
        yield
        calls.append(f"out of {stream.name}")

    def stream(name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: calls.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: calls.append(f"{name} waits for {event.name}"),
        )

    event = SimpleNamespace(
        name="event",
        record=lambda on: calls.append(f"event on {on.name}"),
        synchronize=lambda: calls.append("host waits"),
    )
    current = stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: stream("side"))
    monkeypatch.setattr(torch.cuda, "Event", lambda **_keywords: event)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch, "empty", unpinned(torch.empty))
    monkeypatch.setattr(staging, "_SLAB_BYTES", 1 << 10)
    place = Staging(torch.device("cuda"))
    place.wait()
    place.ready()
    assert calls == []  # nothing was copied yet
    assert all(map(torch.equal, place.copy(TENSORS), TENSORS))
    order = ["side waits for current", "within side", "out of side", "event on side"]
    assert calls == order
    place.wait()
    place.ready()
    assert calls == [*order, "current waits for event", "host waits"]


def test_the_engine_waits_before_it_updates() -> None:
    (order,) = run_ranks(1, order_of_a_step, settings(model__blocks=1))
    assert order == ["wait", "update"]
