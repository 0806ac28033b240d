"""Garbage collection at fixed steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from keel_megatron.training.garbage import GarbageCollection
from keel_megatron.training.stop import StopRequest
from tests.training.test_loop import Bench


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of the collector, in order; nothing is done."""
    asked: list[str] = []
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(gc, name, lambda name=name: asked.append(name))
    yield asked
    assert gc.isenabled()


def test_it_collects_after_the_first_step_and_at_multiples(collected: list[str]) -> None:
    """The first step of a start freezes what stays; later ones go by the run's own number."""
    garbage = GarbageCollection(5)
    with garbage.controlled():
        assert not gc.isenabled()
        for step in range(13, 21):
            garbage.after_step(step)
            assert collected == ["collect", "freeze"] + ["collect"] * ((step - 10) // 5)
    assert collected[-1] == "unfreeze"


def test_zero_leaves_python_alone(collected: list[str]) -> None:
    garbage = GarbageCollection(0)
    with garbage.controlled():
        assert gc.isenabled()
        garbage.after_step(1)
    assert collected == []


def test_an_exception_gives_the_automatic_collection_back(collected: list[str]) -> None:
    with pytest.raises(KeyError), GarbageCollection(1).controlled():
        raise KeyError
    assert collected == ["unfreeze"]


def test_the_loop_collects(collected: list[str]) -> None:
    Bench(training__steps=7, training__gc_every=3).loop.run(StopRequest())
    assert collected == ["collect", "freeze", "collect", "collect", "unfreeze"]
