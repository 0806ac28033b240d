"""Faults of tools/chaos.py caused by users: other starts in a run's folder, and copies of it."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from keel_megatron.runtime import exit_codes
from keel_megatron.tracking.metrics import read_metrics

SECOND = "second start"
REFUSED = "refused start with other text"
COPY = "copy of the run trains on"
CHANGED_COPY = "copy trains on with another optimizer.beta2"
KINDS = (SECOND, REFUSED, COPY, CHANGED_COPY)

_OVERRIDES = {
    SECOND: (),
    REFUSED: (f"data.text={shutil.__file__}",),
    COPY: (),
    CHANGED_COPY: ("optimizer.beta2=0.5",),
}
_COPY_STEPS = 3

Launch = Callable[..., list[str]]
"""Returns the command that starts a process group, from a run's name and overrides."""


class Starts:
    """Starts beside a run that trains; the run itself must not notice.

    Args:
        run: the folder of the run that trains.
        calm: the folder of the undisturbed run, whose losses are what a copy's must be.
        command: makes the command of a group.
        output: gets what the other starts print.
        wait: waits for a condition that it is given, with a text for what.
    """

    def __init__(
        self,
        run: Path,
        calm: Path,
        command: Launch,
        output: TextIO,
        wait: Callable[[Callable[[], bool], str], None],
    ) -> None:
        self._run = run
        self._calm = calm
        self._command = command
        self._output = output
        self._wait = wait

    def inject(self, kind: str) -> str | None:
        """Do one of `KINDS`; what went wrong, if anything."""
        step = last_step(self._run)
        inode = (self._run / "metrics.jsonl").stat().st_ino
        problem = self._copy(kind) if kind in (COPY, CHANGED_COPY) else self._start(kind)
        self._wait(lambda: last_step(self._run) > step, "the run's next step")
        if problem is None and (self._run / "metrics.jsonl").stat().st_ino != inode:
            problem = "metrics.jsonl of the run was replaced"
        return problem

    def _start(self, kind: str) -> str | None:
        """A start in the folder of the run that trains, which must be refused."""
        done = subprocess.run(
            self._command(self._run.name, *_OVERRIDES[kind]),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
        refused = done.returncode == exit_codes.USER_ERROR
        return None if refused else f"the {kind} ended with code {done.returncode}"

    def _copy(self, kind: str) -> str | None:
        """A copy that makes some steps: the calm run's, up to where its settings differ."""
        copy = self._run.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        # cp, unlike shutil.copytree, goes on when a checkpoint is removed under its hands.
        subprocess.run(["cp", "-r", self._run, copy], stderr=subprocess.DEVNULL, check=False)
        before = last_step(copy)
        group = subprocess.Popen(
            self._command(copy.name, *_OVERRIDES[kind]),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait(
                lambda: group.poll() is not None or last_step(copy) >= before + _COPY_STEPS,
                "the steps of the copy",
            )
            group.send_signal(signal.SIGTERM)
            code = group.wait(300)
        finally:
            group.kill()
        if code != exit_codes.to_shell(-signal.SIGTERM):
            return f"the copy ended with code {code}"
        equal = losses(copy).items() <= losses(self._calm).items()
        if equal == (kind == CHANGED_COPY):
            return f"the losses of the copy are {'' if equal else 'not '}those of the calm run"
        return None


def last_step(run: Path) -> int:
    """The last step in a run's metrics."""
    return max(losses(run), default=0)


def losses(run: Path) -> dict[int, str]:
    """Loss and gradient norm of every step, as text: NaN is equal to nothing."""
    return {
        line["step"]: repr((line["loss"], line["grad_norm"]))
        for line in read_metrics(run / "metrics.jsonl")
        if "loss" in line
    }
