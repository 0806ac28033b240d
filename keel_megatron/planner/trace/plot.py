"""The picture of a trace: the memory of every traced rank, allocation by allocation."""

from __future__ import annotations

from typing import Any

from keel_megatron.layout.memory import GB
from keel_megatron.planner.trace.run import Trace
from keel_megatron.tracking.style import picture

_TEXT, _QUIET, _GRID = "#1a202c", "#718096", "#e2e8f0"
_LINE, _PLAN, _RESERVED, _LIMIT = "#2b6cb0", "#dd6b20", "#38a169", "#c53030"
_SHADES = ("#f7fafc", "#edf2f7")


def plot_trace(trace: Trace, *, title: str, limit: float | None = None) -> bytes:
    """Draw the memory of the traced ranks, one below the other.

    Args:
        trace: what was traced.
        title: what is planned.
        limit: bytes that a device has for the model; None = none is drawn.

    Returns:
        The picture, as PNG.
    """
    from matplotlib.figure import Figure

    ranks = trace.ranks
    size = (11.0, 1.0 + 2.3 * len(ranks))
    figure = Figure(figsize=size, dpi=110, facecolor="white")
    axes = figure.subplots(len(ranks), 1, squeeze=False)[:, 0]
    for axis, rank in zip(axes, ranks, strict=True):
        _draw(axis, rank, limit)
    axes[0].legend(loc="lower right", ncols=4, frameon=False, fontsize=8)
    axes[-1].set_xlabel("allocations and releases, in their order", color=_QUIET, fontsize=9)
    figure.suptitle(title, x=0.06, ha="left", fontsize=12, color=_TEXT, weight="bold")
    figure.tight_layout(rect=(0.0, 0.0, 1.0, 0.98))
    return picture(figure)


def _draw(axis: Any, rank: Any, limit: float | None) -> None:
    places, sizes = zip(*rank.curve, strict=True)
    highest = max(rank.peak, rank.planned, rank.reserved) / GB
    axis.fill_between(places, [size / GB for size in sizes], color=_LINE, alpha=0.25, linewidth=0)
    axis.plot(places, [size / GB for size in sizes], color=_LINE, linewidth=0.8, label="allocated")
    axis.axhline(rank.planned / GB, color=_PLAN, linewidth=1.2, label="keel plan")
    axis.axhline(
        rank.reserved / GB, color=_RESERVED, linewidth=1.0, linestyle="--", label="reserved"
    )
    if limit is not None and limit / GB < 1.3 * highest:
        axis.axhline(limit / GB, color=_LIMIT, linewidth=1.0, linestyle=":", label="limit")
        highest = max(highest, limit / GB)
    ends = [at for at, _name in rank.marks[1:]] + [1.0]
    for number, ((start, name), end) in enumerate(zip(rank.marks, ends, strict=True)):
        axis.axvspan(start, end, color=_SHADES[number % 2], zorder=0, linewidth=0)
        if end - start > 0.02:
            axis.text(
                (start + end) / 2, 1.02 * highest, name, ha="center", va="bottom",
                fontsize=8, color=_QUIET,
            )  # fmt: skip
    worst = max(range(len(sizes)), key=lambda at: sizes[at])
    axis.plot(places[worst], sizes[worst] / GB, "o", color=_LINE, markersize=4)
    operator = rank.parts[rank.worst].peak_operator
    axis.set_title(
        f"stage {rank.stage}: {rank.peak / GB:.2f} GB in its {rank.worst}, at {operator}; "
        f"plan {rank.planned / GB:.2f}, reserved {rank.reserved / GB:.2f}, "
        f"with expandable segments {rank.reserved_expandable / GB:.2f}",
        loc="left", fontsize=9, color=_TEXT,
    )  # fmt: skip
    axis.set_xlim(0.0, 1.0)
    axis.set_ylim(0.0, 1.15 * highest)
    axis.set_ylabel("GB", color=_QUIET, fontsize=9)
    axis.set_xticks([])
    axis.grid(axis="y", color=_GRID, linewidth=0.6)
    axis.tick_params(colors=_QUIET, labelsize=8, length=0)
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)
