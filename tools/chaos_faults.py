"""The faults of tools/chaos.py, each injected into a running group of processes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.runtime import exit_codes
from tools import chaos_starts

PATIENCE_SECONDS = 300.0
SMALL_FILE_BYTES = 600_000
"""Larger than log.txt and metrics.jsonl, smaller than a rank's part of a checkpoint."""

SLOW_FILE = "slow"
"""File in the folder of the runs: while it exists, the disturbed run's steps are slow."""


@dataclass
class Injected:
    """One fault and what became of it."""

    kind: str
    rank: str
    step: int
    """The last step that was done when it came."""
    resumed: int | str
    """Step of the checkpoint that the run went on from; - where it never stopped."""
    repeated: int
    seconds: float
    """From the fault until the run was at work again."""
    lost: bool
    """A newer good checkpoint was there, or a start beside the run was not as it should be."""


class Disturbed:
    """A run under a launcher, and the hand that hurts it.

    Args:
        home: has the runs, and gets the output.
        command: of one rank of a run, by its name and overrides.
        processes: how many ranks.
        chance: decides.
    """

    KINDS: ClassVar[tuple[str, ...]] = (
        "kill -9 inside a save",
        "SIGSTOP",
        "checkpoint bit flipped",
        "disk full",
        "disk full for every file",
        "kill -9",
        "SIGTERM",
        "checkpoint file truncated",
        "checkpoint file deleted",
        *chaos_starts.KINDS,
    )

    def __init__(
        self,
        home: Path,
        command: Callable[..., list[str]],
        processes: int,
        chance: random.Random,
    ) -> None:
        self._run = home / "runs" / "hurt"
        self._slow = home / SLOW_FILE
        self._command = command
        self._processes = processes
        self._chance = chance
        self._output = (home / "output.txt").open("w")
        self._launcher = self._start()
        self._starts_beside = chaos_starts.Starts(
            self._run, home / "runs" / "calm", self._group, self._output, self._wait
        )

    def run(self, kinds: list[str]) -> list[Injected]:
        """Inject the faults one after the other, then let the run come to its end."""
        injected = []
        try:
            # Of two, one may be damaged.
            self._wait(lambda: len(self._good()) >= 2, "two checkpoints")
            for kind in kinds:
                target = self._last_step() + self._chance.randint(1, 3)
                self._wait(lambda target=target: self._last_step() >= target, f"step {target}")
                time.sleep(self._chance.uniform(0.0, 0.3))
                injected.append(self._inject(kind))
                print(f"{len(injected)} of {len(kinds)}: {injected[-1]}", flush=True)
            code = self._launcher.wait(timeout=PATIENCE_SECONDS * 4)
            if code != exit_codes.DONE:
                raise SystemExit(f"the disturbed run ended with code {code}")
        finally:
            self._launcher.terminate()
            self._launcher.wait()
            self._output.close()
        return injected

    def _inject(self, kind: str) -> Injected:
        if kind in chaos_starts.KINDS:
            return self._start_beside(kind)
        rank = self._chance.randrange(self._processes)
        starts, written = self._starts(), self._log().count("was not written")
        good, step, begun = self._good(), self._last_step(), time.monotonic()
        shown = str(rank)
        if kind == "disk full":
            self._fill_disk(rank, written)
        elif kind.startswith("disk full"):
            rank, shown = 0, "0"
            self._fill_disk_for_all(written)
        elif kind.startswith("kill"):
            if kind.endswith("save"):
                self._wait(self._saving, "a save")
                time.sleep(self._chance.uniform(0.0, 0.02))
            step = self._last_step()
            self._rank(rank).send_signal(signal.SIGKILL)
        elif kind == "SIGSTOP":
            self._rank(rank).send_signal(signal.SIGSTOP)
        else:
            shown = "all"
            self._stop()
            step, good = self._last_step(), self._good()
            if kind.startswith("checkpoint"):
                self._damage(kind, folder.step_folder(self._run, good.pop()))
            self._launcher = self._start()
        if kind.startswith("disk full"):
            resumed: int | str = "-"
            lost = not set(good[-3:]) <= set(self._good())
            repeated = 0
        else:
            self._wait(lambda: self._starts() > starts, f"the recovery from {kind}")
            resumed = self._resumed()
            lost = resumed < max(good, default=0)
            repeated = max(0, step - resumed)
        seconds = time.monotonic() - begun
        return Injected(kind, shown, step, resumed, repeated, seconds, lost)

    def _start_beside(self, kind: str) -> Injected:
        step, starts, begun = self._last_step(), self._starts(), time.monotonic()
        self._slow.touch()
        try:
            problem = self._starts_beside.inject(kind)
        finally:
            self._slow.unlink()
        if self._starts() != starts:
            problem = problem or "the run was started again"
        if problem is not None:
            print(f"{kind}: {problem}", flush=True)
        seconds = time.monotonic() - begun
        return Injected(kind, "-", step, "-", 0, seconds, lost=problem is not None)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._group(self._run.name, restarts=1000),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def _group(self, name: str, *overrides: str, restarts: int = 0) -> list[str]:
        """The command that starts a run's ranks."""
        command = self._command(name, *overrides)
        code = (
            "import sys; from keel_megatron.runtime.local_launch import launch; "
            f"sys.exit(launch({self._processes}, {command!r}, {restarts}))"
        )
        return [sys.executable, "-c", code]

    def _stop(self) -> None:
        """SIGTERM to the launcher: the run must save and end with the code that says so."""
        self._launcher.send_signal(signal.SIGTERM)
        code = self._launcher.wait(timeout=PATIENCE_SECONDS)
        if code != exit_codes.to_shell(-signal.SIGTERM):
            raise SystemExit(f"SIGTERM ended the run with code {code}")

    def _damage(self, kind: str, checkpoint: Path) -> None:
        path = self._chance.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file()))
        size = path.stat().st_size
        if kind.endswith("deleted"):
            path.unlink()
        elif kind.endswith("truncated"):
            os.truncate(path, self._chance.randrange(size))
        else:
            content = bytearray(path.read_bytes())
            content[self._chance.randrange(size)] ^= 1 << self._chance.randrange(8)
            path.write_bytes(content)

    def _fill_disk(self, rank: int, before: int) -> None:
        """Let no file of a rank grow beyond a size, until a save has failed of it."""
        pid = self._rank(rank).pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, resource.RLIM_INFINITY))
        self._wait(lambda: self._log().count("was not written") > before, "a save that fails")
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)

    def _fill_disk_for_all(self, before: int) -> None:
        """Let nothing be added to any file of rank 0 (metrics, log, depth profiles, outbox).

        For two saves, the second of which fails whole; its failure is in the log afterwards.
        """
        pid = self._rank(0).pid
        self._slow.touch()
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            for _ in range(2):
                self._wait(self._saving, "a save")
                self._wait(lambda: not self._saving(), "the end of a save")
        finally:
            resource.prlimit(
                pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            self._slow.unlink()
        self._wait(lambda: self._log().count("was not written") > before, "what was not written")

    def _rank(self, rank: int) -> psutil.Process:
        """The process of a rank, once it is there."""
        found: list[psutil.Process] = []

        def look() -> bool:
            for child in psutil.Process(self._launcher.pid).children():
                if child.environ().get("RANK") == str(rank):
                    found.append(child)
            return bool(found)

        self._wait(look, f"rank {rank}")
        return found[0]

    def _saving(self) -> bool:
        return any(path.suffix == ".partial" for path in folder.root(self._run).iterdir())

    def _good(self) -> list[int]:
        """Steps of the checkpoints that are as they were written, ascending."""
        good = []
        for step in folder.steps(self._run):
            try:
                manifest.check(folder.step_folder(self._run, step))
            except (manifest.DamagedError, OSError):  # OSError: just pruned
                continue
            good.append(step)
        return good

    def _last_step(self) -> int:
        return chaos_starts.last_step(self._run)

    def _log(self) -> str:
        path = self._run / "log.txt"
        return path.read_text() if path.is_file() else ""

    def _starts(self) -> int:
        return self._log().count("resuming from")

    def _resumed(self) -> int:
        return int(self._log().rpartition("resuming from ")[2].split("step_")[1].split()[0])

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not done():
            if time.monotonic() > end or self._launcher.poll() not in (None, exit_codes.DONE):
                raise SystemExit(
                    f"waited in vain for {what}; launcher's code {self._launcher.poll()}; "
                    f"see {self._output.name}"
                )
            time.sleep(0.002)
