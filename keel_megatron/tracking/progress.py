"""What rank 0 shows: a live line on a terminal, plain lines elsewhere; and log.txt."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from keel_megatron.tracking.records import StepRecord, ValidationRecord

_HEADER = "      step      loss  grad norm  learning rate   tokens/s  time left"
_LINES_PER_HEADER = 20


class Display:
    """Progress of a run and everything that is said about it.

    Args:
        steps: steps of the whole run.
        log: file to which everything that is said is added, with the time.
        log_every: steps between plain lines.
        stream: where to show it; live if it is a terminal.
    """

    def __init__(self, steps: int, log: Path, log_every: int, stream: TextIO | None = None) -> None:
        self._steps = steps
        self._every = log_every
        self._log = log.open("a", encoding="utf-8")
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._rate = _Rate()
        self._lines = 0
        self._validation_loss: float | None = None
        self._live: Progress | None = None

    def say(self, text: str) -> None:
        """Show a line, above the live display if there is one, and keep it in the log."""
        self._console.print(text, markup=False)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._log.write(f"{now} {text}\n")
        self._log.flush()

    def step(self, record: StepRecord) -> None:
        """Show a finished step."""
        left = _duration(self._rate.seconds_a_step(record) * (self._steps - record.step))
        if self._console.is_terminal:
            self._show_live(record, left)
        elif record.step % self._every == 0 or record.step == self._steps:
            self._show_line(record, left)

    def validation(self, record: ValidationRecord) -> None:
        """Show a validation."""
        self._validation_loss = record.validation_loss
        self.say(f"step {record.step}: validation loss {record.validation_loss:.4f}")

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._log.close()

    def _show_line(self, record: StepRecord, left: str) -> None:
        if self._lines % _LINES_PER_HEADER == 0:
            self.say(_HEADER)
        self._lines += 1
        self.say(
            f"{f'{record.step}/{self._steps}':>10}{record.loss:>10.4f}{record.grad_norm:>11.3f}"
            f"{record.learning_rate:>15.3e}{record.tokens_per_second:>11,.0f}{left:>11}"
        )

    def _show_live(self, record: StepRecord, left: str) -> None:
        if self._live is None:
            self._live = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[facts]}"),
                console=self._console,
            )
            self._live.add_task("", total=self._steps, facts="")
            self._live.start()
        known = self._validation_loss
        held_out = "" if known is None else f"  valid {known:.4f}"
        facts = (
            f"loss {record.loss:.4f}{held_out}  lr {record.learning_rate:.2e}  "
            f"grad {record.grad_norm:.2f}  {record.tokens_per_second:,.0f} tok/s  {left} left"
        )
        self._live.update(self._live.task_ids[0], completed=record.step, facts=facts)


class _Rate:
    """Seconds a step, as the clock on the wall sees it: validations and saves included."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def seconds_a_step(self, record: StepRecord) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, record.step)
            return record.seconds
        start, step = self._first
        return (now - start) / max(1, record.step - step)


def _duration(seconds: float) -> str:
    """Days, hours, minutes and seconds, the two largest."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02}h"
    if hours:
        return f"{hours}h {minutes % 60:02}m"
    return f"{minutes}m {whole % 60:02}s"
