"""Curves over the depth of a model, thinned so that those of deep models stay short."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

PLACES = 64
"""Points of a thinned curve: blocks, or means over neighbouring ones where there are more."""


def thinned(values: Sequence[float]) -> list[tuple[float, float | None]]:
    """A quantity of every sub-layer as a curve of at most `PLACES` points, as `grouped` has them.

    A point is a whole number of blocks: attention and FFN differ.
    """
    return grouped(values, 2 * max(1, math.ceil(len(values) / PLACES / 2)))


def grouped(values: Sequence[float], size: int) -> list[tuple[float, float | None]]:
    """(l / L, mean of the finite values) over groups of `size` neighbouring sub-layers."""
    found: list[tuple[float, float | None]] = []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        finite = [value for value in group if math.isfinite(value)]
        place = (start + len(group) / 2) / len(values)
        found.append((place, statistics.fmean(finite) if finite else None))
    return found


def mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean over runs at each place, without missing values; NaN where all are missing."""
    means = []
    for sizes in zip(*curves, strict=True):
        known = [size for size in sizes if size is not None]
        means.append(statistics.fmean(known) if known else math.nan)
    return means
