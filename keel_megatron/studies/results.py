"""Results of a study: rows of its runs, results.json, table.md, and spread over seeds.

Two means are called different if Welch's test at 95 % says so: the difference must exceed
t x sqrt(s_a^2 / n_a + s_b^2 / n_b), where s are the standard deviations over n seeds and t is
Student's quantile. Runs of the same seed have the same data in the same order, so their differences
vary less: `paired_difference` compares the mean of these with 0, by Student's t. With fewer than
two seeds nothing can be said. Imports no torch.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from keel_megatron import __version__
from keel_megatron.config.reading import read_small
from keel_megatron.runtime import exit_codes, machines
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.tables import count
from keel_megatron.runtime.versions import package_versions
from keel_megatron.studies.grid import Grid, GridRun, Row
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.run_log import METRICS_FILE

RESULTS, TABLE, PICTURE = "results.json", "table.md", "picture.png"
LOGS = "logs"
"""Folder with the output of each run's processes."""
LAST_STEPS = 20
"""The final training loss is the mean of at most so many steps, and of at most a tenth of all."""

_T = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23),
    *(2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09),
)
"""Student's t for 95 %, two-sided, by degrees of freedom from 1; above, 1.96 + 2.5 / df."""


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds of a point."""

    mean: float
    """NaN if there is no value."""
    deviation: float
    """Sample standard deviation; NaN for fewer than two values."""
    n: int
    """Runs that have a value: those that diverged have none."""
    diverged: int = 0
    """Runs that diverged."""

    def __str__(self) -> str:
        lost = f"{self.diverged} of {self.n + self.diverged} diverged" if self.diverged else ""
        if not self.n:
            return lost or "-"
        spread = f" ± {self.deviation:.3f}" if self.n > 1 else ""
        return f"{self.mean:.3f}{spread}" + (f" ({lost})" if lost else "")


NOTHING = Spread(0.0, 0.0, 2)
"""A difference of 0, to compare one with."""


def exit_code(run: GridRun) -> int | None:
    """The code that a run left in its folder; None if it has not ended by itself."""
    try:
        return int(read_small(run.folder / exit_codes.FILE, 64))
    except (OSError, ValueError):
        return None


def has_result(run: GridRun) -> bool:
    """Whether a run is complete or has diverged: it is never repeated."""
    return exit_code(run) in (exit_codes.DONE, exit_codes.DIVERGED)


def row_of(grid: Grid, run: GridRun) -> Row:
    """One run's row: labels, and numbers from its log.

    `loss` is the mean training loss of the last steps and `validation_loss` that after the last
    step, nats per token; both are None if the run diverged. `step_seconds` is the median. `machine`
    is what trained it.
    """
    records = list(iterate_metrics(run.folder / METRICS_FILE))
    steps = [m for m in records if "loss" in m]
    validations = [m["validation_loss"] for m in records if "validation_loss" in m]
    last = steps[-max(1, min(LAST_STEPS, run.config.training.steps // 10)) :]
    loss = statistics.fmean(m["loss"] for m in last) if last else math.nan
    diverged = exit_code(run) == exit_codes.DIVERGED or not math.isfinite(loss)
    seconds = [m["seconds"] for m in steps[1:] or steps]
    measured = {
        "run": run.name,
        **run.labels,
        "diverged": diverged,
        "loss": None if diverged else loss,
        "validation_loss": None if diverged or not validations else validations[-1],
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["consumed_tokens"] if steps else 0,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "ended": _date(records[-1]["time"] / 1000) if records else None,
        "machine": machines.named(machines.recorded(run.folder)),
    }
    return {**measured, **grid.study.row(run.point, run.folder)}


def collect(grid: Grid) -> list[Row]:
    """Rows of the grid's runs that have a result."""
    return [row_of(grid, run) for run in grid.runs if has_result(run)]


def write_results(
    name: str,
    out: Path,
    rows: Sequence[Row],
    missing: Sequence[str] = (),
    machine: str | None = None,
    **more: Any,
) -> None:
    """Write results.json: rows, and where, when and by what they were measured.

    Args:
        name: the study.
        out: its folder.
        rows: JSON objects; a number that is not finite is written as null.
        missing: names of runs without a result so far.
        machine: what measured all rows; None: each row says it.
        more: further entries.

    Raises:
        OSError: it cannot be written.
    """
    found = {
        "study": name,
        **provenance(rows, machine),
        **more,
        "missing": list(missing),
        "rows": list(rows),
    }
    write_whole(out / RESULTS, json.dumps(_finite(found), indent=1, allow_nan=False) + "\n")


def write_table(out: Path, table: str, rows: Sequence[Row], machine: str | None = None) -> None:
    """Write table.md: a study's table under the command, the machines and the date.

    Args:
        out: the study's folder.
        table: Markdown.
        rows: what it shows.
        machine: as for `write_results`.

    Raises:
        OSError: it cannot be written.
    """
    origin = provenance(rows, machine)
    heading = (
        f"`{origin['command']}`\n\n{_where(origin)}; "
        f"keel-megatron {origin['version']}, torch {origin['packages'].get('torch', '-')}; "
        f"{origin['date']}\n\n"
    )
    write_whole(out / TABLE, heading + table.rstrip() + "\n")


def provenance(rows: Sequence[Row], machine: str | None = None) -> dict[str, Any]:
    """Where results come from.

    Command, version, packages and `collected_on` are this process's; `machines` are those that
    trained or measured the rows, with the number of rows; `date` is when the last run ended.
    """
    names = Counter(machine or row["machine"] for row in rows)
    ended = [row["ended"] for row in rows if row.get("ended")]
    words = [Path(sys.argv[0]).name.replace("__main__.py", "keel"), *sys.argv[1:]]
    return {
        "command": shlex.join(words),
        "version": __version__,
        "machines": dict(names),
        "collected_on": str(machines.this_machine()),
        "date": max(ended, default=_date(time.time())),
        "packages": package_versions(),
    }


def groups(rows: Iterable[Row], *labels: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some labels, in the grid's order: usually one group per point."""
    found: dict[tuple[Hashable, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[label] for label in labels), []).append(row)
    return found


def spread(rows: Iterable[Row], key: str = "loss") -> Spread:
    """Mean and standard deviation of a column over rows, without runs that diverged."""
    rows = list(rows)
    values = [row[key] for row in rows if row.get(key) is not None]
    return Spread(
        statistics.fmean(values) if values else math.nan,
        statistics.stdev(values) if len(values) > 1 else math.nan,
        len(values),
        sum(bool(row.get("diverged")) for row in rows),
    )


def is_different(a: Spread, b: Spread) -> bool | None:
    """Whether two means differ by more than their spread (module docstring); None: unknown."""
    if min(a.n, b.n) < 2:
        return None
    parts = [one.deviation**2 / one.n for one in (a, b)]
    error = math.sqrt(sum(parts))
    if error == 0.0:
        return a.mean != b.mean
    freedom = sum(parts) ** 2 / sum(
        part**2 / (one.n - 1) for part, one in zip(parts, (a, b), strict=True)
    )
    number = max(1, int(freedom))
    t = _T[number - 1] if number <= len(_T) else 1.96 + 2.5 / number
    return abs(a.mean - b.mean) > t * error


def difference(a: Spread, b: Spread) -> str:
    """The difference a - b for a table: the number, or that it is within the spread."""
    if not (a.n and b.n):
        return "-"
    text = f"{a.mean - b.mean:+.3f}"
    known = is_different(a, b)
    if known is None:
        return f"{text} (no spread: one seed)"
    return text if known else f"no difference ({text})"


def excess(rows: Iterable[Row], baseline: Iterable[Row], key: str = "loss") -> Spread:
    """A column of rows minus that of a baseline with the same seed: the same data, the same order.

    Over the seeds that both have. Between seeds losses differ more than between such pairs.
    """
    known = {row["seed"]: row[key] for row in baseline if row.get(key) is not None}
    pairs = [row for row in rows if row.get(key) is not None and row["seed"] in known]
    return spread(({key: row[key] - known[row["seed"]]} for row in pairs), key)


def paired_difference(rows: Iterable[Row], baseline: Iterable[Row], key: str = "loss") -> str:
    """`excess` for a table: the number, or that it is within its spread (Student's t)."""
    return difference(excess(rows, baseline, key), NOTHING)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers are aligned to the right."""

    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    def is_number(position: int) -> bool:
        return all(isinstance(row[position], (int, float)) for row in rows)

    marks = ["--:" if rows and is_number(n) else "---" for n in range(len(columns))]
    return "\n".join([line(columns), line(marks), *(line(row) for row in rows)])


def _finite(value: Any) -> Any:
    """A value for strict JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value


def _date(seconds: float) -> str:
    """The day of a time in seconds since 1970, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _where(origin: Mapping[str, Any]) -> str:
    """The machines of a study for its table's heading."""
    names: Mapping[str, int] = origin["machines"]
    shown = [
        name if len(names) == 1 else f"{name} ({count(n, 'run')})" for name, n in names.items()
    ]
    if any(machines.NOT_RECORDED in name for name in names):
        return f"machine: {'; '.join(shown)}; results collected on {origin['collected_on']}"
    return "; ".join(shown)
