"""The start of a run's process group, which a signal may still break off."""

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
"""In which a signal that one rank has received reaches the others."""


@contextmanager
def process_group(
    config: RunConfig, launch: Launch, stop: StopRequest
) -> Iterator[tuple[Runtime, list[str]]]:
    """Within the block the process group exists: this rank's place, and the pre-flight's remarks.

    Args:
        config: the run.
        launch: what the launcher says of this process.
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
    """A collective that fails because a signal has ended another rank first ends this one too."""
    try:
        yield
    except CollectiveTimeoutError:
        end = time.monotonic() + _SIGNAL_SECONDS
        while stop.starting and stop.signal is None and time.monotonic() < end:
            time.sleep(0.05)
        if stop.signal is not None:
            stop.break_off(stop.signal)
        raise
