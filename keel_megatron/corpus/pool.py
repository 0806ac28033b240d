"""Does a build's jobs on this machine, with worker processes."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from keel_megatron.corpus.plan import Job, Plan
from keel_megatron.corpus.tokenize import Done, Tokenizing
from keel_megatron.errors import UserError
from keel_megatron.runtime.interpreter import environment, python

SMALL: Final = 32 << 20
"""Up to this many bytes are tokenized in this process, because workers take a second to start."""


def run_jobs(
    folder: Path, plan: Plan, jobs: Sequence[Job], workers: int, report: Callable[[Done], None]
) -> None:
    """Do jobs, the largest part of a build.

    Finished jobs stay when it is interrupted.

    Args:
        folder: the folder that is being built.
        plan: its plan.
        jobs: those to do.
        workers: number of processes, at least 1.
        report: called with what was done, from several threads.

    Raises:
        UserError: a job failed.
    """
    if not jobs:
        return
    if sum(job.bytes for job in jobs) <= SMALL:
        tokenizing = Tokenizing(folder, plan)
        for job in jobs:
            tokenizing.run(job, report)
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in sorted(jobs, key=lambda job: -job.bytes):  # a large one last would be waited for
        waiting.put(job)
    pool = [_Worker(folder, waiting, report) for _ in range(min(workers, len(jobs)))]
    try:
        for worker in pool:
            worker.thread.start()
        _await(pool)
    finally:
        for worker in pool:
            worker.end()
    failed = [worker.error for worker in pool if worker.error is not None]
    if failed:
        raise UserError(failed[0])


def _await(pool: Sequence[_Worker]) -> None:
    """Wait until all workers have ended, or one has failed."""
    while any(worker.thread.is_alive() for worker in pool):
        for worker in pool:
            worker.thread.join(0.1)
            if worker.error is not None:
                return


class _Worker:
    """A process, and the thread that hands it jobs.

    Attributes:
        error: why it failed, or None.
    """

    def __init__(
        self, folder: Path, waiting: queue.SimpleQueue[Job], report: Callable[[Done], None]
    ) -> None:
        self.error: str | None = None
        self.thread = threading.Thread(target=self._run, name="tokenizing", daemon=True)
        self._waiting = waiting
        self._report = report
        self._is_ended = False
        self._process = subprocess.Popen(
            [*python(), "-m", "keel_megatron.corpus.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment() | {"TOKENIZERS_PARALLELISM": "false"},
            text=True,
            encoding="utf-8",
        )

    def end(self) -> None:
        """End the process, if it has not."""
        self._is_ended = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self) -> None:
        while True:
            try:
                job = self._waiting.get_nowait()
            except queue.Empty:
                break
            if not self._do(job):
                return
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process.wait()

    def _do(self, job: Job) -> bool:
        """Have the process do a job; returns whether it succeeded."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(OSError):  # it has died, which the end of its output shows
            stdin.write(f"{job.name}\n")
            stdin.flush()
        for line in stdout:
            message = json.loads(line)
            if "error" in message:
                self.error = message["error"]
                return False
            if "done" in message:
                return True
            self._report(Done(**message))
        code = self._process.wait()
        if self._is_ended:
            return False
        self.error = (
            f"a worker process ended while it did {job.name} (exit code {code}); if the machine "
            "was short of memory, use fewer --workers; start again to resume"
        )
        return False
