"""A collective that fails at the start because a signal has ended another rank."""

from __future__ import annotations

import signal

import pytest

from keel_megatron.runtime.rendezvous import CollectiveTimeoutError
from keel_megatron.training import process_group
from keel_megatron.training.stop import StopRequest


def fail(stop: StopRequest) -> None:
    with process_group._ended_by_signal(stop):
        raise CollectiveTimeoutError("nobody answers")


def test_a_rank_that_has_heard_the_signal_ends_with_it() -> None:
    stop = StopRequest(starting=True)
    stop.signal = signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        fail(stop)
    assert ended.value.code == 143


def test_without_a_signal_the_error_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_SIGNAL_SECONDS", 0.1)
    with pytest.raises(CollectiveTimeoutError):
        fail(StopRequest(starting=True))


def test_after_the_start_a_signal_changes_no_error() -> None:
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(CollectiveTimeoutError):
        fail(stop)
