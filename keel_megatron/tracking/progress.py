"""Rank 0's console: a live display on a terminal, text lines elsewhere; and log.txt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from keel_megatron.config.batch_sizes import BatchSizes
from keel_megatron.tracking.records import EvaluationRecord, StepRecord, ValidationRecord
from keel_megatron.tracking.screen import Screen

_LINES_PER_HEADER = 20


class Progress:
    """Progress and messages of a run.

    On a terminal, two live lines stay at the bottom and messages appear above them. Elsewhere, a
    text line is printed every `log_every` steps. The log has messages and text lines in both cases.
    Thread-safe.

    Args:
        steps: steps of the whole run.
        log: log file, with times in UTC; None: set later by `keep`.
        log_every: steps between text lines.
        stream: output stream; None: standard output.
        clock: a monotonic clock in seconds, for the time left.
        sizes: sequences of each step, in proportion to which steps take time; None: all alike.
    """

    def __init__(
        self,
        steps: int,
        log: Path | None,
        log_every: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        sizes: BatchSizes | None = None,
    ) -> None:
        self._screen = Screen(log, stream)
        self._steps = steps
        self._every = log_every
        self._lock = threading.RLock()
        self._left = _TimeLeft(steps, clock, sizes)
        self._width = max(10, 2 * len(str(steps)) + 2)
        self._lines = 0
        self._last: StepRecord | None = None
        self._validation_loss: float | None = None

    def keep(self, log: Path) -> None:
        """Write everything to a file from now on, earlier messages first."""
        self._screen.keep(log)

    def say(self, text: str) -> None:
        """Show a message, above the live display if there is one, and write it to the log.

        Parts of URLs that may be secret are hidden.
        """
        self._screen.say(text)

    def note(self, text: str) -> None:
        """Write a message to the log only."""
        self._screen.note(text)

    def step(self, record: StepRecord) -> None:
        """Show a finished step."""
        with self._lock:
            self._last = record
            left = self._left.after(record)
            if record.step % self._every == 0 or record.step == self._steps:
                out = self.note if self._screen.is_live else self.say
                if self._lines % _LINES_PER_HEADER == 0:
                    out(self._header())
                self._lines += 1
                out(self._line(record, left))
            if self._screen.is_live:
                self._screen.draw(lambda: self._picture(record, left))

    def validation(self, record: ValidationRecord) -> None:
        """Show a validation."""
        self._validation_loss = record.validation_loss
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in record.sources.items())
        self.say(
            f"step {record.step}: validation loss {record.validation_loss:.4f}"
            f"{f' ({each})' if each else ''}"
        )

    def evaluation(self, record: EvaluationRecord) -> None:
        """Show an evaluation, a line for each task."""
        for task, metrics in record.results.items():
            values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.say(f"step {record.step}: {task}: {values}")

    def stop(self) -> None:
        """End the live display; later messages are text lines."""
        with self._lock:
            last = self._last
            self._screen.stop(None if last is None else self._picture(last, self._left.last))

    def close(self) -> None:
        """End the live display and close the log; later messages are only shown."""
        try:
            self.stop()
        finally:
            self._screen.close()

    def _header(self) -> str:
        return f"{'step':>{self._width}}      loss  grad norm  learning rate   tokens/s  time left"

    def _line(self, record: StepRecord, left: float) -> str:
        return (
            f"{f'{record.step}/{self._steps}':>{self._width}} {record.loss:>9.4f}"
            f" {record.grad_norm:>10.3f} {record.learning_rate:>14.3e}"
            f" {record.tokens_per_second:>10,.0f} {duration(left):>10}"
        )

    def _picture(self, record: StepRecord, left: float) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            Text(f"step {record.step}/{self._steps}", style="bold"),
            ProgressBar(self._steps, record.step, complete_style="cyan", finished_style="cyan"),
            Text(f"{duration(left)} left", style="bold"),
        )
        facts = [("loss", f"{record.loss:.4f}")]
        if self._validation_loss is not None:
            facts.append(("validation", f"{self._validation_loss:.4f}"))
        facts += [
            ("grad norm", f"{record.grad_norm:.3f}"),
            ("lr", f"{record.learning_rate:.2e}"),
            ("tokens/s", f"{record.tokens_per_second:,.0f}"),
        ]
        line = Text("  ", no_wrap=True, overflow="ellipsis").join(
            Text.assemble((name, "dim"), " ", value) for name, value in facts
        )
        line.no_wrap, line.overflow = True, "ellipsis"
        return Group(bar, line)


class _TimeLeft:
    """Wall-clock seconds to the end of the run, validations and saves included.

    The time is measured per sequence, so that the small batches of a ramp-up count less. Without
    `sizes` a step counts as one sequence.
    """

    def __init__(
        self, steps: int, clock: Callable[[], float], sizes: BatchSizes | None = None
    ) -> None:
        self._steps = steps
        self._clock = clock
        self._sizes = sizes
        self._first: tuple[float, int] | None = None
        self._rate = 0.0
        self.last = 0.0
        """Of the last record."""

    def after(self, record: StepRecord) -> float:
        """After a step: from the mean so far, without the first step."""
        now = self._clock()
        sizes = self._sizes or BatchSizes(1)
        consumed = record.step if self._sizes is None else record.consumed_samples
        if self._first is None:
            # The first step includes compilation and allocation, so the measurement starts after
            # it.
            self._first = (now, consumed)
            self._rate = record.seconds / sizes.at(consumed)
        elif consumed > self._first[1]:
            start, before = self._first
            self._rate = (now - start) / (consumed - before)
        self.last = self._rate * sizes.samples_of(self._steps - record.step, consumed)
        return self.last


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02}h"
    if hours:
        return f"{hours}h {minutes % 60:02}m"
    return f"{minutes}m {whole % 60:02}s"
