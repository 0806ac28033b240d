"""Start several processes of a command on this machine, as `torchrun --standalone` does.

None of torchrun's own pieces is used:

- `torch.distributed.run` takes 1.4 s of CPU time to import, where this module takes 0.2 s (2 cores
  of an Intel Xeon); errors in a configuration must be shown at once.
- Its agent restarts a group after every failure: what was saved and stopped on purpose, too, and
  a usage error (runtime/exit_codes.py). It exits with 1 for any error of a process.
- It ends a group at the first failure or signal. Here a request to save reaches every rank once,
  and the others have time to end by themselves.
- Its processes inherit no open file: rank 0 needs the hold on the run's folder and the listening
  socket, which keeps the group's port from being taken or reached from outside.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.interpreter import environment, python
from keel_megatron.runtime.ownership import PASSED_ON, Ownership

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
POLL_SECONDS = 0.05
SETTLE_SECONDS = 2.0
"""After a failure, for the others to notice and end by themselves, so that their codes count."""
LEAVE_SECONDS = 60.0
"""After the first that was stopped on purpose, for the others to deliver what they report."""
GRACE_SECONDS = 10.0
"""From SIGTERM to SIGKILL for those that do not."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
STORE_LISTENER = "KEEL_STORE_LISTENER"
"""Variable with the number of the listening socket on which rank 0 opens the group's store."""


def launch(
    processes: int,
    command: list[str],
    max_restarts: int = 0,
    owned: Ownership | None = None,
    variables: Mapping[str, str] | None = None,
    *,
    saves: bool = False,
) -> int:
    """Run `python COMMAND` as a group of processes of this machine.

    A group that fails is started again, up to `max_restarts` times. Signals that ask a run to stop
    are handed to every process; then nothing is started again.

    Args:
        processes: how many.
        command: the arguments of each.
        max_restarts: how often a group is started again.
        owned: the hold on the run's folder, which rank 0 of every group shares.
        variables: further environment variables of every process.
        saves: a process that is asked to stop saves first, and is given time for it.

    Returns:
        The exit code: 0, or that of the first process that failed (128 + n for signal n).
    """
    run_id = uuid.uuid4().hex
    with _forwarding() as forward:
        for restart in range(max_restarts + 1):
            if forward.asked is not None:
                return exit_codes.to_shell(-forward.asked)
            forward.group = _Group(processes, command, run_id, restart, owned, variables or {})
            if forward.asked is not None:  # while they were being started
                forward.group.signal(forward.asked)
            rank, code = forward.group.wait(saves)
            if forward.asked == signal.SIGUSR1 and code == exit_codes.to_shell(-signal.SIGUSR1):
                code = exit_codes.SAVED  # it died before it could hear it: nothing is lost
            if code in exit_codes.FINAL or forward.asked is not None or restart == max_restarts:
                return code
            print(
                f"rank {rank} ended with code {code}: restarting all {processes} process(es) "
                f"({restart + 1} of {max_restarts})",
                file=sys.stderr,
                flush=True,
            )
    return exit_codes.FAILED


class _Group:
    """The processes of one attempt, and the port at which they find each other."""

    def __init__(
        self,
        processes: int,
        command: list[str],
        run_id: str,
        restart: int,
        owned: Ownership | None,
        variables: Mapping[str, str],
    ) -> None:
        self._asked = False
        with socket.create_server(("127.0.0.1", 0), backlog=max(128, processes)) as listener:
            # Opened here, so that the port is free for sure, and not to be reached from outside.
            self._port = listener.getsockname()[1]
            for_main = {STORE_LISTENER: listener.fileno()}
            if owned is not None:
                for_main[PASSED_ON] = owned.descriptor
            self._workers = [
                subprocess.Popen(
                    [*python(), *command],
                    env=environment()
                    | dict(variables)
                    | self._environment(rank, processes, run_id, restart)
                    | ({} if rank else {name: str(number) for name, number in for_main.items()}),
                    pass_fds=() if rank else tuple(for_main.values()),
                    # Ctrl-C in a terminal reaches the launcher alone, which hands it on once.
                    process_group=0,
                )
                for rank in range(processes)
            ]

    def _environment(self, rank: int, size: int, run_id: str, restart: int) -> dict[str, str]:
        """The environment that torchrun sets, and defaults."""
        values = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._port,
            "TORCHELASTIC_RUN_ID": run_id,
            "TORCHELASTIC_RESTART_COUNT": restart,
            # The launcher itself starts again what is to be started again.
            "TORCHELASTIC_MAX_RESTARTS": 0,
            # No rank opens a store of its own at that port.
            "TORCHELASTIC_USE_AGENT_STORE": True,
            # The ranks end with it (runtime/parent.py).
            "KEEL_LAUNCHER_PID": os.getpid(),
            # gloo's and NCCL's own connections: no more reachable from outside than the port.
            **(dict.fromkeys(_INTERFACES, "lo") if sys.platform == "linux" else {}),
            # Each process sets its own threads (training.threads); this is what it starts with.
            "OMP_NUM_THREADS": 1,
        }
        chosen = {*_INTERFACES, "OMP_NUM_THREADS"} & os.environ.keys()
        return {name: str(value) for name, value in values.items() if name not in chosen}

    def signal(self, number: int) -> None:
        """Hand a signal to every process that runs."""
        self._asked = True
        for worker in self._workers:
            worker.send_signal(number)  # does nothing to one that has ended

    def wait(self, saves: bool) -> tuple[int, int]:
        """Wait for the end of all; the rank whose code counts, and the code."""
        while not self._failures() and self._running():
            time.sleep(POLL_SECONDS)
        stopped = any(code in exit_codes.FINAL for _rank, code in self._failures())
        ended_at = time.monotonic()
        while self._running():
            # After Ctrl-C, one that saves nothing and is still there waits for one that has ended.
            leaves = stopped and (saves or not self._asked)
            if time.monotonic() > ended_at + (LEAVE_SECONDS if leaves else SETTLE_SECONDS):
                break
            time.sleep(POLL_SECONDS)
        failures = self._failures()
        if self._running():
            self.signal(signal.SIGTERM)
            self._wait_for_end(GRACE_SECONDS)
            self.signal(signal.SIGKILL)
            self._wait_for_end(GRACE_SECONDS)
        # An exit code that forbids a restart takes precedence over the others.
        failures.sort(key=lambda found: found[1] not in exit_codes.FINAL)
        return failures[0] if failures else (0, exit_codes.DONE)

    def _running(self) -> bool:
        return any(worker.poll() is None for worker in self._workers)

    def _failures(self) -> list[tuple[int, int]]:
        """(rank, exit code) of those that have failed, killed ones first: others follow them."""
        found = [
            (rank, worker.returncode)
            for rank, worker in enumerate(self._workers)
            if worker.poll() not in (None, exit_codes.DONE)
        ]
        found.sort(key=lambda failure: failure[1])
        return [(rank, exit_codes.to_shell(code)) for rank, code in found]

    def _wait_for_end(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._running() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)


class _Forward:
    """Which group gets the signals, and the last one that has come."""

    def __init__(self) -> None:
        self.group: _Group | None = None
        self.asked: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.asked = number
        if self.group is not None:
            self.group.signal(number)


@contextmanager
def _forwarding() -> Iterator[_Forward]:
    """Within the block the signals go to the group."""
    forward = _Forward()
    chosen = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in chosen}
    try:
        yield forward
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
