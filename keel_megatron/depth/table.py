"""What `keel depth` shows: a table for the terminal, and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keel_megatron.depth.profile import (
    QUANTITIES,
    DepthProfile,
    Values,
    finite_values,
    first_nonfinite,
)
from keel_megatron.errors import UserError
from keel_megatron.runtime.tables import table_lines

_GROUPS = 16


def select(
    profiles: Sequence[DepthProfile], quantity: str | None, step: int | None
) -> DepthProfile:
    """The profile of a step; the latest for None.

    Raises:
        UserError: there is no profile of that step, or it lacks the quantity.
    """
    found = profiles[-1]
    if step is not None:
        steps = [profile.step for profile in profiles]
        if step not in steps:
            near = sorted(sorted(steps, key=lambda other: abs(other - step))[:4])
            raise UserError(
                f"--step: there is no profile of step {step}; near it are those of "
                f"{', '.join(map(str, near))}"
            )
        found = profiles[steps.index(step)]
    if quantity in found.missing:
        raise UserError(f"--quantity: {quantity} was not recorded at step {found.step}; try --step")
    if quantity is not None and not found.values[quantity].count():
        raise UserError(f"--quantity: no sub-layer of this run has {quantity}")
    return found


def table(first: DepthProfile, shown: DepthProfile, quantity: str | None) -> str:
    """A profile as text: one line per quantity, or one quantity by groups of sub-layers.

    Args:
        first: the run's first profile, whose medians are shown for comparison.
        shown: the profile.
        quantity: the quantity to show; None shows all.
    """
    head = f"{shown.sub_layers} sub-layers at step {shown.step}"
    columns = ["minimum", "median", "maximum", f"median, step {first.step}", "not finite from"]
    if quantity is None:
        rows = [
            [name, *_figures(values), _figures(first.values[name])[1], _first(values)]
            for name, values in shown.values.items()
            if values.count()
        ]
        return _text(head, ["", *columns], rows)
    values, before = shown.values[quantity], first.values[quantity]
    # Even, so that every group has as many attention sub-layers as FFN sub-layers.
    size = 1 if len(values) <= _GROUPS else 2 * math.ceil(len(values) / _GROUPS / 2)
    rows = []
    for start in range(0, len(values), size):
        stop = min(start + size, len(values))
        name = str(start) if size == 1 else f"{start} - {stop - 1}"
        part = values[start:stop]
        rows.append(
            [name, *_figures(part), _figures(before[start:stop])[1], _first(part, after=start)]
        )
    title = f"{quantity}: {QUANTITIES[quantity].label}, {head}"
    return _text(title, ["sub-layers", *columns], rows)


def as_object(first: DepthProfile, shown: DepthProfile, quantity: str | None) -> dict[str, Any]:
    """A profile as a JSON object: each quantity's values by sub-layer, and its figures.

    Args:
        first: the run's first profile, for comparison.
        shown: the profile.
        quantity: the quantity to show; None shows all.
    """
    lists = shown.to_json()["depth"]
    found = {}
    for name in [quantity] if quantity else lists:
        values = shown.values[name]
        if not values.count():
            continue
        finite, before = finite_values(values), finite_values(first.values[name])
        found[name] = {
            "minimum": float(finite.min()) if finite.size else None,
            "median": float(np.median(finite)) if finite.size else None,
            "maximum": float(finite.max()) if finite.size else None,
            "median_first_step": float(np.median(before)) if before.size else None,
            "first_nonfinite": first_nonfinite(values),
            "values": lists[name],
        }
    return {
        "step": shown.step,
        "first_step": first.step,
        "sub_layers": shown.sub_layers,
        "quantities": found,
    }


def draw(
    profiles: Sequence[DepthProfile],
    shown: DepthProfile,
    quantity: str | None,
    name: str,
    folder: Path,
) -> list[Path]:
    """The pictures that go with the table.

    Raises:
        UserError: the folder cannot be written.
    """
    from keel_megatron.depth.pictures import plot_all, plot_quantity

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if quantity is None:
            return plot_all(profiles, name, folder, shown)
        return [plot_quantity(profiles, quantity, name, folder, shown)]
    except OSError as error:
        raise UserError(f"--out: cannot write into {folder}: {error.strerror}") from error


def _figures(values: Values) -> list[str]:
    """Minimum, median and maximum of what is finite."""
    finite = finite_values(values)
    if not finite.size:
        return ["-"] * 3
    return [f"{figure:.4g}" for figure in (finite.min(), np.median(finite), finite.max())]


def _first(values: Values, after: int = 0) -> str:
    """The first sub-layer whose value is not finite; nothing if there is none."""
    found = first_nonfinite(values)
    return "" if found is None else str(after + found)


def _text(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Title and table; without the last column if it is empty."""
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return "\n".join([title, *table_lines(columns, rows, left=[0])])
