"""The MLflow worker: a process that reads a run's log, delivers it to MLflow and draws pictures.

    python -m keel_megatron.mlflow_delivery.worker RUN --parent PID --start NAME [--to URI]

MLflow is imported and called only here, so that training never waits for it. The worker also
notices when the training process dies: a run that ends without logging its end, by kill -9 or by
its watchdog, gets the status FAILED.

It sends messages to its parent as lines on standard output. `keel track sync` does the same work
once, after a crash or when a server was unreachable.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from pathlib import Path

from keel_megatron.depth.drawing import DepthDrawer
from keel_megatron.mlflow_delivery.database import database_of
from keel_megatron.mlflow_delivery.delivery import Delivery
from keel_megatron.mlflow_delivery.filesystem import network_filesystem
from keel_megatron.mlflow_delivery.presence import HEARTBEAT_SECONDS, the_only_one
from keel_megatron.mlflow_delivery.reasons import reason
from keel_megatron.mlflow_delivery.target import Target
from keel_megatron.tracking.outbox import FOLDER

POLL_SECONDS = 0.5
LONGEST_PAUSE = 30.0
LINGER_SECONDS = 60.0
"""How long the worker of an ended run retries an unreachable server, in seconds."""

DELIVERED, UNUSABLE, LEFT = 0, 2, 3
"""Exit codes: everything is delivered; MLflow cannot be used; some reports are undelivered."""


def follow(
    run: Path,
    parent: int,
    start: str,
    say: Callable[[str], None],
    confirmed: Collection[str] = (),
) -> int:
    """Deliver until the training process has ended and everything is delivered; draw meanwhile.

    The last pictures are drawn after everything else is delivered, so that they delay nothing.

    Args:
        run: the run's folder.
        parent: the training process, this one's parent.
        start: name of its start.
        say: as for `Delivery`.
        confirmed: as for `Delivery`.

    Returns:
        The exit code.
    """
    drawer = DepthDrawer(run)
    network = _network(run)
    if network is not None:
        say(
            f"{run.parent} is on a network file system ({network}): `keel dashboard` and "
            "`keel track sync` update MLflow's database there"
        )
    with nullcontext() if network else the_only_one(run, wait=True):
        delivery = Delivery(run, say, confirmed=confirmed)
        heartbeat = pause = 0.0
        dead_since: float | None = None
        while True:
            is_orphan = os.getppid() != parent  # checked before reading the log
            if time.monotonic() >= heartbeat:
                heartbeat = time.monotonic() + HEARTBEAT_SECONDS
                with suppress(OSError):
                    (run / FOLDER / "alive").touch()
            delivery.scan()
            done = network is None and delivery.deliver()
            reader = delivery.reader
            if is_orphan and dead_since is None:
                dead_since = time.monotonic()
            if is_orphan and reader.last_start.get("name") != start:
                return LEFT  # the run was started again: its new worker waits for this one
            if done and is_orphan and not reader.ended:
                done = delivery.end("FAILED")
            lingered = dead_since is not None and time.monotonic() - dead_since > LINGER_SECONDS
            if (reader.ended and (done or not is_orphan)) or lingered:
                _draw(delivery, drawer, say)
                return DELIVERED if done and reader.ended else LEFT
            if drawer.is_due:
                _draw(delivery, drawer, say)
            pause = POLL_SECONDS if done else min(LONGEST_PAUSE, max(POLL_SECONDS, 2 * pause))
            _rest(pause, parent, delivery)


def _network(run: Path) -> str | None:
    """The type of the network file system of the local database; None if it may be written.

    Several machines must not write one SQLite file, so workers do not write it there, unless
    tracking.uri names it.
    """
    target = Target.newest(run)
    is_local = target is not None and target.uri is None
    return network_filesystem(database_of(run).parent) if is_local else None


def _draw(delivery: Delivery, drawer: DepthDrawer, say: Callable[[str], None]) -> None:
    try:
        pictures = drawer.draw()
    except Exception as error:  # a failed picture does not stop the delivery
        say(f"cannot draw the depth profiles: {type(error).__name__}: {error}")
        return
    with suppress(Exception):  # the end of the run delivers them, or says that it cannot
        delivery.show(pictures)


def _rest(seconds: float, parent: int, delivery: Delivery) -> None:
    """Wait; return early if the run ends."""
    until = time.monotonic() + seconds
    was_parent, was_ended = os.getppid() == parent, delivery.reader.ended
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(POLL_SECONDS / 2, left))
        delivery.scan()
        if (os.getppid() == parent) != was_parent or delivery.reader.ended != was_ended:
            return


def main() -> None:
    """The process that `WorkerProcess` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--parent", type=int, required=True, help="the training process")
    parser.add_argument("--start", required=True, help="name of its start")
    parser.add_argument("--to", action="append", default=[], help="its tracking.uri")
    arguments = parser.parse_args()
    # Signals of a launcher or scheduler are for the training process, whose end must still be
    # delivered.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def say(text: str) -> None:
        with suppress(OSError):
            print(text, flush=True)

    try:
        code = follow(arguments.run, arguments.parent, arguments.start, say, arguments.to)
    except ImportError as error:
        say(
            f"MLflow cannot be imported ({error}): install mlflow-skinny, sqlalchemy and alembic, "
            "or set tracking.mlflow=false; training continues, metrics.jsonl has every record"
        )
        code = UNUSABLE
    except Exception as error:
        say(f"the MLflow worker stops: {reason(error)}")
        code = 1
    with suppress(OSError):
        sys.stdout.close()
    os._exit(code)


if __name__ == "__main__":
    main()
