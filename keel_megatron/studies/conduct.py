"""A study from its grid to its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes, ownership
from keel_megatron.studies.cost import cost_of
from keel_megatron.studies.grid import Grid, GridRun, Row
from keel_megatron.studies.parent import reported
from keel_megatron.studies.results import (
    PICTURE,
    RESULTS,
    TABLE,
    has_result,
    row_of,
    write_results,
    write_table,
)
from keel_megatron.studies.runner import Ended, LocalRunner
from keel_megatron.studies.slurm import run_on_slurm
from keel_megatron.tracking.screen import Screen

LOG = "study.log"
Say = Callable[[str], None]


def run_here(grid: Grid, parallel: int, *, measure: bool = True) -> int:
    """Run a grid on this machine, and write its results; the exit code.

    Args:
        grid: the runs.
        parallel: runs at the same time.
        measure: first measure and say what the runs will cost.

    Raises:
        UserError: another process works in the study's folder, or it cannot be written.
    """
    with ownership.take(grid.out, ownership.STUDIED), closing(Screen(grid.out / LOG)) as screen:
        say = screen.say
        rows, seconds = Rows(grid), dict[str, float]()
        if measure and not all(map(has_result, grid.runs)):
            cost = cost_of(grid, parallel, say=say)
            say("\n".join(cost.summary()))
            seconds = cost.seconds
        with reported(grid, say) as report:
            ended = LocalRunner(grid, parallel, screen, rows.add, seconds).run()
            rows.conclude(say)
            code = _end(grid, ended, say)
            if ended.signal is not None:
                report.status = "KILLED"
            elif code == exit_codes.DONE:
                report.status = "FINISHED"
        return code


def run_on_cluster(grid: Grid, parallel: int, options: Sequence[str]) -> int:
    """Submit a grid as a SLURM array, or write the results of one that has ended; the exit code.

    Args:
        grid: the runs.
        parallel: array tasks at the same time.
        options: further options of sbatch.

    Raises:
        UserError: as `run_on_slurm`, or another process works in the study's folder.
    """
    with (
        ownership.take(grid.out, ownership.STUDIED),
        closing(Screen(grid.out / LOG)) as screen,
        reported(grid, screen.say) as report,
    ):
        say = screen.say
        left = run_on_slurm(grid, parallel, options, say)
        Rows(grid).conclude(say)
        report.status = "KILLED" if left else "FINISHED"
    return exit_codes.DONE


class Rows:
    """Rows of a grid; results.json is written again with each new one.

    Args:
        grid: the runs; those that have a result are read.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._rows = {run.name: row_of(grid, run) for run in grid.runs if has_result(run)}

    def add(self, run: GridRun) -> Row:
        """Add a run that has ended, and write results.json; its row."""
        row = self._rows[run.name] = row_of(self._grid, run)
        self._write()
        return row

    def conclude(self, say: Say) -> None:
        """Write results.json, table.md and the picture, and show the table.

        Raises:
            UserError: one of them cannot be written.
        """
        rows, study, out = self._ordered(), self._grid.study, self._grid.out
        if not rows:
            return
        self._write()
        table = study.table(rows)
        with _writing(out):
            write_table(out, table, rows)
            study.picture(rows, out / PICTURE)
        say(f"{table}\n{out / RESULTS}, {out / TABLE}, {out / PICTURE}")

    def _ordered(self) -> list[Row]:
        """In the grid's order."""
        return [self._rows[run.name] for run in self._grid.runs if run.name in self._rows]

    def _write(self) -> None:
        missing = [run.name for run in self._grid.runs if run.name not in self._rows]
        with _writing(self._grid.out):
            write_results(self._grid.study.name, self._grid.out, self._ordered(), missing)


def _end(grid: Grid, ended: Ended, say: Say) -> int:
    """Report how a study ended; its exit code."""
    total = len(grid.runs)
    if ended.signal is not None:
        say(f"stopped with {ended.done} of {total} runs done; the same command resumes the rest")
        return exit_codes.to_shell(-ended.signal)
    if not ended.failed:
        return exit_codes.DONE
    say(
        f"{len(ended.failed)} of {total} runs have no result: {', '.join(ended.failed)}; the same "
        "command retries them"
    )
    return exit_codes.FAILED


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: cannot write {error.filename or out}: {error.strerror}") from error
