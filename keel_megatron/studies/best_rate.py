"""Sweeps of the learning rate within a grid: each design is judged at its own best rate.

The best rate of a design is the one with the lowest mean final loss over the seeds, of those at
which no seed diverged. At an end of the sweep the true best may lie outside; tables mark that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keel_megatron.errors import UserError
from keel_megatron.studies.grid import Row
from keel_megatron.studies.results import Spread, groups, spread

RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Best:
    """A design at its best rate."""

    rate: float
    rows: tuple[Row, ...]
    """Its runs, one a seed."""
    mark: str
    """`<` at the lowest rate of the sweep, `>` at the highest, else nothing."""

    def loss(self, key: str) -> Spread:
        """A column over the seeds."""
        return spread(self.rows, key)

    @property
    def shown(self) -> str:
        """The rate for a table."""
        return f"{self.mark}{self.rate:g}"


def check_rates(rates: Sequence[float]) -> None:
    """Refuse rates that are not positive.

    Raises:
        UserError: there is one.
    """
    for rate in rates:
        if not rate > 0.0:
            raise UserError(f"--rates: {rate:g} must be above 0")


def loss_key(rows: Sequence[Row]) -> str:
    """The column that designs are judged by: the validation loss if all runs have one."""
    finished = [row for row in rows if not row["diverged"]]
    known = all(row["validation_loss"] is not None for row in finished)
    return "validation_loss" if finished and known else "loss"


def best_rates(rows: Sequence[Row], *labels: str) -> dict[tuple[Any, ...], Best | None]:
    """Each design's best rate, by its labels; None if it diverged at every rate.

    Args:
        rows: with a label `rate`.
        labels: what names a design.
    """
    key = loss_key(rows)
    found: dict[tuple[Any, ...], Best | None] = {}
    for design, some in groups(rows, *labels).items():
        by_rate = {rate: runs for (rate,), runs in groups(some, "rate").items()}
        losses = {
            rate: spread(runs, key).mean
            for rate, runs in by_rate.items()
            if not any(row["diverged"] for row in runs)
        }
        if not losses:
            found[design] = None
            continue
        rate = min(losses, key=losses.__getitem__)
        ends = {min(by_rate): "< ", max(by_rate): "> "} if len(by_rate) > 1 else {}
        found[design] = Best(rate, tuple(by_rate[rate]), ends.get(rate, ""))
    return found


EDGE = (
    "`<` and `>`: the best rate is the lowest or highest of the sweep; a better one may be beyond."
)
"""Below a table with marks."""
