"""The thread that reads a step ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from keel_megatron.data.batches import Batch
from keel_megatron.data.prefetch import Prefetcher

CPU = torch.device("cpu")


class Source:
    """Notes what is read, and in which thread; a step of one batch that holds its number."""

    def __init__(self, missing: int = -1) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()
        self.missing = missing

    def micro_batches(self, consumed: int, size: int) -> Iterator[Batch]:
        self.threads.add(threading.current_thread().name)
        self.read.append(consumed)
        if consumed == self.missing:
            raise OSError("the disk is gone")
        yield Batch(torch.tensor([[consumed, size]]))


def numbers(batches: list[Batch]) -> list[Any]:
    return [batch.tokens.tolist() for batch in batches if batch.tokens is not None]


def test_a_step_is_read_while_the_one_before_it_trains() -> None:
    source = Source()
    with closing(Prefetcher(source.micro_batches, CPU)) as prefetcher:
        assert numbers(prefetcher.take(0, 4, 4)) == [[[0, 4]]]
        ahead = prefetcher._ahead
        assert ahead is not None
        ahead[1].result(timeout=60)  # nobody has asked for it yet
        assert source.read == [0, 4]
        assert numbers(prefetcher.take(4, 4, 0)) == [[[4, 4]]]
    assert source.read == [0, 4]
    assert threading.current_thread().name not in source.threads


def test_another_step_than_the_expected_one_is_read_anew() -> None:
    """After a rollback, say."""
    with closing(Prefetcher(Source().micro_batches, CPU)) as prefetcher:
        prefetcher.take(0, 4, 4)
        assert numbers(prefetcher.take(40, 4, 8)) == [[[40, 4]]]
        assert numbers(prefetcher.take(44, 8, 0)) == [[[44, 8]]]


def test_an_error_is_raised_at_the_step_that_it_concerns() -> None:
    with closing(Prefetcher(Source(missing=4).micro_batches, CPU)) as prefetcher:
        prefetcher.take(0, 4, 4)
        with pytest.raises(OSError, match="the disk is gone"):
            prefetcher.take(4, 4, 4)


def test_the_thread_ends() -> None:
    before = set(threading.enumerate())
    prefetcher = Prefetcher(Source().micro_batches, CPU)
    prefetcher.take(0, 4, 4)
    (thread,) = set(threading.enumerate()) - before
    prefetcher.close()
    assert not thread.is_alive()
