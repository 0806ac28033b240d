"""Table of `keel runs`: one line per run, then the problems."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keel_megatron.config.terminal import printable
from keel_megatron.dashboard.runs import RunStatus
from keel_megatron.tracking.progress import duration

_COLOURS = {
    "running": "green",
    "preparing": "green",
    "finished": "blue",
    "saved": "cyan",
    "silent": "yellow",
    "failed": "bold red",
    "hung": "bold red",
    "lost": "bold red",
    "unreadable": "bold red",
}
_LARGE_LOSS = 1e5
_NUMBERS = ("step", "loss", "tokens/s", "time left", "checkpoint")


def runs_table(runs: Sequence[RunStatus]) -> RenderableType:
    """The runs in their order, then the problems of those that have any."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        cells = Text(_name(run), style="bold"), Text(run.state, style=_COLOURS[run.state])
        table.add_row(*cells, *_figures(run))
    notes = [_note(run, line) for run in runs for line in run.problems]
    return Group(table, *([Text(), *notes] if notes else []))


def _figures(run: RunStatus) -> list[str]:
    return [
        f"{run.step:,}/{run.steps:,}" if run.steps else f"{run.step:,}",
        "-" if run.loss is None else _loss(run.loss),
        "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        "-" if run.seconds_left is None else duration(run.seconds_left),
        _checkpoint(run),
    ]


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if abs(loss) < _LARGE_LOSS else f"{loss:.3e}"


def _checkpoint(run: RunStatus) -> str:
    if run.checkpoint is None or run.checkpoint_age is None:
        return "-"
    # The larger of its two units: a column that is narrow enough for 80 beside a long name.
    return f"{run.checkpoint:,}, {_largest_unit(run.checkpoint_age)} ago"


def _largest_unit(seconds: float) -> str:
    """Such as 2h or 40s."""
    found = next(part for part in duration(seconds).split() if part != "0m")
    return found.removeprefix("0") if len(found) > 2 else found


def _name(run: RunStatus) -> str:
    return printable(run.name, one_line=True)


def _note(run: RunStatus, line: str) -> Text:
    style = "" if run.state in ("running", "saved", "finished") else _COLOURS[run.state]
    return Text.assemble((_name(run), "bold"), ": ", (printable(line), style))
