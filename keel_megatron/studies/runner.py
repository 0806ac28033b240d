"""Runs a grid on this machine: each run is a `keel train` process of its own.

A run that is complete or has diverged is never repeated; any other resumes from its newest
checkpoint. A run that fails does not end the study. Ctrl-C or SIGTERM asks the processes to save;
if the study is killed, the kernel asks them (runtime/parent.py). Imports no torch.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes, ownership
from keel_megatron.runtime.interpreter import environment, python
from keel_megatron.runtime.parent import STARTED_BY
from keel_megatron.runtime.processes import count_gpus
from keel_megatron.studies.grid import Grid, GridRun, Row
from keel_megatron.studies.results import LOGS, has_result
from keel_megatron.studies.status import RunStatus, Status
from keel_megatron.tracking.progress import duration
from keel_megatron.tracking.run_log import METRICS_FILE
from keel_megatron.tracking.screen import Screen

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.1
_BUSY_SECONDS = 2.0
"""Between looks at a folder in which a process of an earlier start still saves."""
_SHOWN_LINES = 8
_TAIL_BYTES = 1 << 14


@dataclass
class _Process:
    """A run at work."""

    run: GridRun
    popen: subprocess.Popen[bytes]
    log: Path
    start: int
    """Where this start's output begins in the log."""
    slot: int
    began: float
    status: RunStatus
    asked: bool = False
    """Whether it has had a signal to end."""


@dataclass
class Ended:
    """How the runs of a grid ended."""

    done: int = 0
    """Runs with a result, those of earlier commands included."""
    failed: dict[str, str] = field(default_factory=dict)
    """The others that ended by themselves: name to the end of their output."""
    signal: int | None = None
    """The signal that stopped the study."""


class LocalRunner:
    """Runs a grid in processes of this machine.

    Args:
        grid: the runs.
        parallel: processes at the same time (groups of them for a layout with several ranks).
        screen: shows progress and messages.
        finished: called after a run has ended with a result; returns its row.
        seconds: predicted seconds of each run by name, which weigh the time left.
    """

    def __init__(
        self,
        grid: Grid,
        parallel: int,
        screen: Screen,
        finished: Callable[[GridRun], Row],
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self._grid = grid
        self._parallel = parallel
        self._say = screen.say
        self._status = Status(screen)
        self._seconds = seconds or {}
        self._finished = finished
        self._running: list[_Process] = []
        self._ended = Ended()
        self._took: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._shown: list[list[str]] = []
        """Last lines of the failures so far: many runs may fail for one reason."""

    def run(self) -> Ended:
        """Run what has no result yet."""
        waiting = [run for run in self._grid.runs if not has_result(run)]
        self._ended.done = len(self._grid.runs) - len(waiting)
        if self._ended.done:
            self._say(f"{self._ended.done} of {len(self._grid.runs)} runs have their results")
        with _hearing(self._stop):
            try:
                self._loop(waiting)
            finally:  # an error of this process
                self._signal(signal.SIGTERM)
                for process in self._running:
                    process.popen.wait()
                self._status.end()
        return self._ended

    def _loop(self, waiting: list[GridRun]) -> None:
        told = False
        while self._running or (waiting and self._ended.signal is None):
            if self._ended.signal is not None and not told:
                told = True
                name = signal.Signals(self._ended.signal).name
                self._say(f"{name}: waiting until {len(self._running)} run(s) have saved")
            if self._ended.signal is None and len(self._running) < self._parallel:
                run = next((run for run in waiting if self._is_free(run)), None)
                if run is not None:
                    waiting.remove(run)
                    self._start(run)
                    continue
            for process in list(self._running):
                code = process.popen.poll()
                if code is not None:
                    self._running.remove(process)
                    self._note(process, exit_codes.to_shell(code), waiting)
            self._status.show([process.status for process in self._running])
            time.sleep(POLL_SECONDS)

    def _start(self, run: GridRun) -> None:
        slot = min(set(range(self._parallel)) - {process.slot for process in self._running})
        log = self._grid.out / LOGS / f"{run.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            popen = subprocess.Popen(
                [*python(), "-m", "keel_megatron", *run.command],
                env=environment()
                | {STARTED_BY: str(os.getpid())}
                | _devices(slot, run.processes, self._parallel),
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches the study alone, which asks once.
                process_group=0,
            )
            start = output.tell()
        status = RunStatus(run.name, run.folder / METRICS_FILE, run.config.training.steps)
        process = _Process(run, popen, log, start, slot, time.monotonic(), status)
        self._running.append(process)
        if self._ended.signal is not None and not process.asked:
            popen.send_signal(signal.SIGTERM)  # a signal came before it was in the list
        self._say(f"{run.name}: started")

    def _note(self, process: _Process, code: int, waiting: list[GridRun]) -> None:
        """Note the end of a run."""
        run, took = process.run, time.monotonic() - process.began
        if has_result(run):
            self._ended.done += 1
            self._took[run.name] = took
            row = self._finished(run)
            loss = "diverged" if row["diverged"] else f"loss {row['loss']:.3f}"
            total = len(self._grid.runs)
            left = self._left([*waiting, *(other.run for other in self._running)])
            self._say(
                f"{run.name}: {loss} after {duration(took)}; {self._ended.done} of {total} done"
                + (f", about {duration(left)} left" if left else "")
            )
        elif self._ended.signal is None:
            end = _tail(process.log, process.start)
            self._ended.failed[run.name] = end
            what = "saved and stopped" if code == exit_codes.SAVED else f"failed with code {code}"
            last = end.splitlines()[-1:]
            if last and last in self._shown:
                end = f"    ...\n{last[0]}"
            self._shown.append(last)
            self._say(f"{run.name}: {what}; the end of {process.log}:\n{end}")

    def _left(self, others: list[GridRun]) -> float:
        """Seconds until the end, from the durations so far; 0.0 if nothing is left."""
        mean = sum(self._took.values()) / len(self._took)
        predicted = [self._seconds.get(name, math.nan) for name in self._took]
        if not math.isfinite(sum(predicted)):
            return mean * len(others) / self._parallel
        factor = sum(self._took.values()) / sum(predicted)
        return factor * sum(self._seconds.get(run.name, 0.0) for run in others) / self._parallel

    def _is_free(self, run: GridRun) -> bool:
        """Whether no process trains in the run's folder, as after a kill of an earlier study."""
        if not (run.folder / ownership.FILE).exists():
            return True
        now = time.monotonic()
        if now < self._busy.get(run.name, -math.inf):
            return False
        try:
            ownership.take(run.folder).release()
        except UserError as error:
            if run.name not in self._busy:
                self._say(f"{run.name}: waits: {error}")
            self._busy[run.name] = now + _BUSY_SECONDS
            return False
        return True

    def _stop(self, number: int) -> None:
        """Ask the processes to save and end; a second signal ends them at once.

        Called by a signal's handler, so nothing is printed here.
        """
        self._ended.signal = number
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for process in self._running:
            process.asked = True
            process.popen.send_signal(number)  # does nothing to one that has ended


def _devices(slot: int, processes: int, parallel: int) -> dict[str, str]:
    """GPUs of their own for the runs of a slot, if there are enough for all slots."""
    count = count_gpus() or 0
    if count < processes * parallel or parallel == 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot * processes : (slot + 1) * processes])}


def _tail(log: Path, start: int) -> str:
    """The last lines that a run has written."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _TAIL_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])


@contextmanager
def _hearing(stop: Callable[[int], None]) -> Iterator[None]:
    """Within the block, signals call `stop`."""

    def hear(number: int, _frame: FrameType | None) -> None:
        stop(number)

    chosen = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, hear) for number in chosen}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
