"""The start of a run's process group, which a signal can still abort."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from keel_megatron.cluster import doctor, preflight
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.runtime.rendezvous import CollectiveTimeoutError
from keel_megatron.training.stop import StopRequest

_SIGNAL_SECONDS = 3.0
"""Time for a signal received by one rank to reach the others, in seconds."""


@contextmanager
def process_group(
    config: RunConfig, launch: Launch, stop: StopRequest
) -> Iterator[tuple[Runtime, list[str]]]:
    """Context with the process group: this rank's runtime, and the pre-flight's messages.

    Args:
        config: the run.
        launch: the launcher's environment of this process.
        stop: the requests to stop.

    Raises:
        UserError: the device is absent, or the nodes do not fit together.
        SystemExit: a signal has ended another rank while the run was starting.
    """
    checked = preflight.wanted(config, launch)
    facts = doctor.facts(config) if checked else None
    with _ended_by_signal(stop), start(config.parallel, config.training, launch, facts) as runtime:
        yield runtime, preflight.check(config, runtime) if checked else []


@contextmanager
def _ended_by_signal(stop: StopRequest) -> Iterator[None]:
    """End this rank if a collective fails because a signal has ended another rank."""
    try:
        yield
    except CollectiveTimeoutError:
        end = time.monotonic() + _SIGNAL_SECONDS
        while stop.starting and stop.signal is None and time.monotonic() < end:
            time.sleep(0.05)
        if stop.signal is not None:
            stop.break_off(stop.signal)
        raise
