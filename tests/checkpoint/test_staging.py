"""Host copies of a save: whose values they have, whose memory, and what waits for them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.checkpoint import staging
from keel_megatron.checkpoint.staging import Staging, packed
from tests.checkpoint.state_ranks import order_of_a_step
from tests.distributed import run_ranks
from tests.settings import settings

TENSORS = [torch.arange(5.0), torch.arange(3, dtype=torch.int64), torch.ones(7, dtype=torch.int8)]


@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_copies_keep_their_values_and_the_memory_is_used_again(
    as_on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_LEAST_SLAB", 64)
    place = Staging(torch.device("cpu"))
    place._is_cuda = as_on_cuda  # packed
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


@given(st.lists(st.integers(0, 9 << 20), max_size=40))
def test_slabs_hold_every_tensor_once(sizes: list[int]) -> None:
    slabs, places = packed(sizes)
    assert all(slab.bit_count() == 1 for slab in slabs)  # else torch would round it up
    ends = [0] * len(slabs)
    for (slab, start), size in sorted(zip(places, sizes, strict=True)):
        assert start >= ends[slab]
        assert start % 64 == 0
        ends[slab] = start + size
    assert all(end <= slab for end, slab in zip(ends, slabs, strict=True))


def test_slabs_are_no_larger_than_the_state() -> None:
    """64 sub-layers on 16 replicas, three tensors a weight: 0.5 GB."""
    weights = [128000 * 1024] * 2 + 32 * [1024 * size for size in (4096, 2048, 6144, 3072, 1, 1)]
    sizes = [4 * weight // 16 for weight in weights for _state in range(3)]
    assert sum(sizes) <= sum(packed(sizes)[0]) < 1.01 * sum(sizes)
    assert packed([100])[0] == [1 << 20]


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
