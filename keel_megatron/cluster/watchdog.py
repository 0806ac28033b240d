"""Watchdog: ends a process group in which a rank hangs, and names the rank.

Each rank has a thread that checks the time of the rank's last progress (a finished step, validation
or save). Without a hang it does nothing else. When a rank makes no progress for too long, its
thread creates the folder `hangs/START` in the run's folder. The other ranks' threads see it. Each
responsive rank writes a report there: the stacks of all threads, what its main thread is doing, and
which hosts it cannot connect to. The reports identify the hanging rank. Then each process exits,
because a main thread blocked in a collective cannot continue.

The watchdog uses files and not the process group's store, because the store may be in the hanging
process; all nodes share the run's folder anyway.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

from keel_megatron.cluster import flight_recorder
from keel_megatron.cluster.connectivity import ANSWER_SECONDS, Doorbells, cut_off
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.files import write_whole

FOLDER = "hangs"
_WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/", "param_and_grad_buffer.py")
"""Source files of code that waits for other ranks."""
_ADVICE = (
    "To resume, start the same command again. If the machine was overloaded or paused, nothing "
    "else is wrong; if steps are always this slow, raise training.hang_timeout."
)


@dataclass(frozen=True)
class RankReport:
    """A rank's report when the group hangs."""

    rank: int
    place: str
    """Its pipeline stage, tensor rank and replica."""
    marks: int
    """Number of progress marks."""
    last: str
    """Its last progress."""
    seconds: float
    """Time since then, seconds."""
    main_thread: str
    """Position of its main thread: file, line and function."""
    waits: bool
    """Whether it is waiting for other ranks."""
    host: str = ""
    unanswered: list[str] = field(default_factory=list)
    """Hosts to which its host cannot connect, if this rank tests for its host."""
    pending: str | None = None
    """On CUDA: its unfinished message."""
    collectives: dict[str, int] = field(default_factory=dict)
    """On CUDA: the number of collectives that it has started, by group."""
    whole: bool = True
    """Whether nothing will be added to the report."""


class Watchdog:
    """One rank's watchdog; a context manager around the training loop.

    Args:
        runtime: this rank.
        folder: the run's folder.
        timeout: seconds without progress until it acts; 0: never.
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
        """Record progress, such as "step 17"."""
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
        """Write a report, wait for the others' reports, print the verdict, and end this process."""
        grace = min(30.0, max(1.0, self._timeout / 4)) + ANSWER_SECONDS
        # If the file system hangs, this C code still ends the process.
        faulthandler.dump_traceback_later(2 * grace, exit=True)
        with suppress(
            OSError
        ):  # the disk may be full; the other ranks and the exit code matter more
            self._folder.mkdir(parents=True, exist_ok=True)
            report = self._write_report()
            if not report.whole:
                self._add_messages(report)
        hosts = self._runtime.hosts
        deadline = time.monotonic() + grace
        reports = read_reports(self._folder)
        while time.monotonic() < deadline:
            reports = read_reports(self._folder)
            if sum(report.whole for report in reports) == len(hosts):
                break
            time.sleep(grace / 20)
        if reports and reports[0].rank == self._runtime.rank:
            text = verdict(reports, hosts, self._timeout) + f"; stacks in {self._folder}"
            with suppress(OSError):
                print(f"{text}\n{_ADVICE}", file=sys.stderr, flush=True)
                write_whole(self._folder / "verdict.txt", text + "\n")
        # The first rank that ends has the launcher end the others, so the verdict comes before.
        while not (self._folder / "verdict.txt").exists() and time.monotonic() < deadline:
            time.sleep(grace / 20)
        os._exit(exit_codes.HUNG)

    def _write_report(self) -> RankReport:
        runtime = self._runtime
        frames = sys._current_frames()
        main = traceback.extract_stack(frames.get(self._main or 0))
        report = RankReport(
            rank=runtime.rank,
            place=runtime.describe(),
            marks=self._marks,
            last=self._last,
            seconds=round(time.monotonic() - self._time),
            main_thread=_location(main),
            waits=any(name in frame.filename for frame in main[-4:] for name in _WAITING),
            host=runtime.host,
            unanswered=self._doorbells.unanswered(),
            whole=runtime.device.type != "cuda",
        )
        self._stacks = _stacks(frames)
        self._write(report)
        return report

    def _add_messages(self, report: RankReport) -> None:
        """Add the flight recorder's contents, which might hang: so not at first."""
        with suppress(KeyError, TypeError, ValueError, RuntimeError):  # another version's format
            text = flight_recorder.dump()
            if text is not None:
                write_whole(self._folder / f"nccl_{report.rank:05d}.json", text)
                found = flight_recorder.read(text)
                report = replace(
                    report, waits=found.waits, pending=found.pending, collectives=found.counts
                )
        self._write(replace(report, whole=True))

    def _write(self, report: RankReport) -> None:
        head = json.dumps(asdict(report)) + "\n"
        write_whole(self._folder / f"rank_{report.rank:05d}.txt", head + self._stacks)


def _stacks(frames: Mapping[int, FrameType]) -> str:
    """The stacks of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for number, frame in frames.items():
        lines.append(f"\nthread {names.get(number, number)}, innermost call last:\n")
        lines += traceback.format_stack(frame)
    return "".join(lines)


def read_reports(folder: Path) -> list[RankReport]:
    """Read the reports of a hang, by rank."""
    paths = sorted(folder.glob("rank_*.txt"))
    heads = (path.read_text(encoding="utf-8").partition("\n")[0] for path in paths)
    return [RankReport(**json.loads(head)) for head in heads]


def verdict(reports: Sequence[RankReport], hosts: Sequence[str], timeout: float) -> str:
    """Name the hanging rank, in one sentence.

    A rank without a report is stopped, dead or disconnected. If all ranks report, it is, in this
    order: the host that others cannot connect to; the rank that does not wait while others wait;
    the rank that has started fewer collectives of a group than its other members; the rank with
    the least progress; the rank at another position than most.

    Args:
        reports: the reports, by rank.
        hosts: the host of every rank.
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
    for found in (busy, _behind(reports), least, odd):
        if found and len(found) < len(reports):
            named = "; ".join(
                f"{r.place} did not arrive: {r.seconds:g} s after {r.last} it is at {r.main_thread}"
                for r in found
            )
            waiting = Counter(r.pending for r in reports if r not in found and r.pending)
            if waiting:
                named += f"; the others wait in {waiting.most_common(1)[0][0]}"
            return f"{head}: {named}"
    if world_size == 1:
        (alone,) = reports
        return f"{head}: {alone.seconds:g} s after {alone.last} it is at {alone.main_thread}"
    return f"{head}: every rank waits for another one"


def _behind(reports: Sequence[RankReport]) -> list[RankReport]:
    """The ranks that have started fewer collectives of a group than another member."""
    most: dict[str, int] = {}
    for report in reports:
        for group, count in report.collectives.items():
            most[group] = max(most.get(group, 0), count)
    return [r for r in reports if any(n < most[group] for group, n in r.collectives.items())]


def _location(stack: traceback.StackSummary) -> str:
    if not stack:
        return "no Python code"
    return f"{stack[-1].filename}:{stack[-1].lineno} ({stack[-1].name})"
