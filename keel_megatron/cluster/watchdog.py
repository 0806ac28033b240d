"""The watchdog: ends a group in which a rank hangs, and says which one.

Every rank has a thread that looks at the time of the rank's last mark (a finished step, validation
or save). While all is well that is all it does: nothing is written and nobody is asked. When one
rank's mark is too old, it makes the folder `hangs/START` in the run's folder; the others' threads
see it, and each rank that still can writes there the stacks of all its threads, what its main
thread is doing and which hosts it does not reach. From these reports follows who did not arrive.
Then every process ends itself, since a main thread that is blocked in a collective can do nothing
any more.

Files, not the process group's store: the store may live in the very process that was stopped, and
the run's folder is shared by all nodes anyway.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from keel_megatron.cluster.connectivity import ANSWER_SECONDS, Doorbells, cut_off
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.files import write_whole

FOLDER = "hangs"
_WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/", "param_and_grad_buffer.py")
"""Files of code that waits for other ranks."""


@dataclass(frozen=True)
class RankReport:
    """What one rank says of itself when the group hangs."""

    rank: int
    place: str
    """Its stage, tensor rank and replica."""
    marks: int
    """How often it has made progress."""
    last: str
    """What it had finished last."""
    seconds: float
    """How long ago."""
    main_thread: str
    """Where its main thread is: file, line and function."""
    waits: bool
    """Whether it waits there for other ranks."""
    host: str = ""
    unanswered: list[str] = field(default_factory=list)
    """Hosts that its host does not reach, if it is the one that asks for its host."""


class Watchdog:
    """One rank's watchdog; a context manager around the training loop.

    Args:
        runtime: this rank's place.
        folder: the run's folder.
        timeout: seconds without a mark until it acts; 0 = never.
    """

    def __init__(self, runtime: Runtime, folder: Path, timeout: float) -> None:
        self._runtime = runtime
        self._timeout = timeout
        self._marks = 0
        self._last = "the start"
        self._time = time.monotonic()
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        started = runtime.from_main(lambda: time.strftime("%Y%m%d-%H%M%S"))
        self._folder = folder / FOLDER / started
        self._doorbells = Doorbells(runtime)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def mark(self, what: str) -> None:
        """Note progress, such as "step 17"."""
        self._marks += 1
        self._last = what
        self._time = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._time = time.monotonic()
        if self._timeout > 0:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        if self._timeout > 0:
            self._thread.join()
        self._doorbells.close()

    def _watch(self) -> None:
        interval = self._timeout / 20
        while not self._ended.wait(interval):
            if time.monotonic() - self._time > self._timeout or self._folder.is_dir():
                self._end_group()

    def _end_group(self) -> None:
        """Report, wait for the others' reports, say who is missing, and end this process."""
        grace = min(30.0, max(1.0, self._timeout / 4)) + ANSWER_SECONDS
        # Should the file system be what hangs: C code ends the process without asking anybody.
        faulthandler.dump_traceback_later(2 * grace, exit=True)
        with suppress(OSError):  # the disk may be full: the others and the exit code matter more
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_report()
        hosts = self._runtime.hosts
        deadline = time.monotonic() + grace
        while (
            len(reports := read_reports(self._folder)) < len(hosts) and time.monotonic() < deadline
        ):
            time.sleep(grace / 20)
        if reports and reports[0].rank == self._runtime.rank:
            text = verdict(reports, hosts, self._timeout) + f"; stacks in {self._folder}"
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)
                write_whole(self._folder / "verdict.txt", text + "\n")
        os._exit(exit_codes.HUNG)

    def _write_report(self) -> None:
        runtime = self._runtime
        frames = sys._current_frames()
        main = traceback.extract_stack(frames.get(self._main or 0))
        report = RankReport(
            rank=runtime.rank,
            place=runtime.describe(),
            marks=self._marks,
            last=self._last,
            seconds=round(time.monotonic() - self._time, 3),
            main_thread=_location(main),
            waits=any(name in frame.filename for frame in main[-4:] for name in _WAITING),
            host=runtime.host,
            unanswered=self._doorbells.unanswered(),
        )
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [json.dumps(asdict(report)) + "\n"]
        for number, frame in frames.items():
            lines.append(f"\nthread {names.get(number, number)}, innermost call last:\n")
            lines += traceback.format_stack(frame)
        write_whole(self._folder / f"rank_{runtime.rank:05d}.txt", "".join(lines))


def read_reports(folder: Path) -> list[RankReport]:
    """The reports of a hang, by rank."""
    paths = sorted(folder.glob("rank_*.txt"))
    heads = (path.read_text(encoding="utf-8").partition("\n")[0] for path in paths)
    return [RankReport(**json.loads(head)) for head in heads]


def verdict(reports: Sequence[RankReport], hosts: Sequence[str], timeout: float) -> str:
    """Who did not arrive, in one sentence.

    A rank that gives no report is stopped, dead or cut off. If all give one, it is the host that
    the others do not reach; else who does not wait for others while others wait; else who has made
    the least progress; else who is elsewhere than most (on CUDA all seem to wait for their own
    device).

    Args:
        reports: of the ranks that gave one, by rank.
        hosts: every rank's host.
        timeout: `training.hang_timeout`.
    """
    world_size = len(hosts)
    head = f"watchdog: no progress in training.hang_timeout = {timeout:g} s"
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    if missing:
        ranks = ", ".join(str(rank) for rank in missing)
        if len(set(hosts)) > 1:
            ranks += f" on host {', '.join(dict.fromkeys(hosts[rank] for rank in missing))}"
        return f"{head}: rank {ranks} gives no answer (stopped, dead or cut off); the others wait"
    cut = cut_off({report.host: report.unanswered for report in reports if report.unanswered})
    if cut is not None:
        return f"{head}: {cut}"
    busy = [report for report in reports if not report.waits]
    least = [report for report in reports if report.marks == min(r.marks for r in reports)]
    places = Counter(report.main_thread for report in reports)
    odd = [r for r in reports if places[r.main_thread] < max(places.values())]
    for found in (busy, least, odd):
        if found and len(found) < len(reports):
            named = "; ".join(
                f"{r.place} did not arrive: {r.seconds:g} s after {r.last} it is at {r.main_thread}"
                for r in found
            )
            return f"{head}: {named}"
    if world_size == 1:
        (alone,) = reports
        return f"{head}: {alone.seconds:g} s after {alone.last} it is at {alone.main_thread}"
    return f"{head}: every rank waits for another one"


def _location(stack: traceback.StackSummary) -> str:
    if not stack:
        return "no Python code"
    return f"{stack[-1].filename}:{stack[-1].lineno} ({stack[-1].name})"
