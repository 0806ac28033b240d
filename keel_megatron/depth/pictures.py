"""Pictures of depth profiles: heat maps over depth and steps, and two steps compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from keel_megatron.depth.profile import (
    QUANTITIES,
    DepthProfile,
    Quantity,
    Values,
    finite_values,
    first_nonfinite,
    not_recorded,
)
from keel_megatron.tracking.style import (
    ALARM,
    BLUE,
    NOTHING,
    ORANGE,
    QUIET,
    TEXT,
    TITLE,
    dress,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

HEAT_MAPS, LATEST = "depth_heat_maps.png", "depth_latest.png"
_COLUMNS = 4
_ROWS_DRAWN = 128
_DECADES = 12.0


def plot_all(
    profiles: Sequence[DepthProfile], name: str, folder: Path, shown: DepthProfile | None = None
) -> list[Path]:
    """Draw every quantity into two PNGs.

    Args:
        profiles: a run's, in the order of their steps, all of the same depth.
        name: the run's, for the title.
        folder: where to draw.
        shown: the step to compare with the first; None is the latest.

    Returns:
        `depth_heat_maps.png`, depth x step, and `depth_latest.png` (`depth_step_N.png` for another
        step), that step compared with the first.
    """
    names = [q for q in QUANTITIES if stacked(profiles, q).count()]
    first, latest = profiles[0], profiles[-1]
    step = shown or latest
    lines_out = folder / (LATEST if step is latest else f"depth_step_{step.step}.png")

    figure = _grid(names, lambda axes, quantity: draw_heat_map(axes, profiles, quantity))
    facts = f"{latest.sub_layers} sub-layers, steps {first.step} to {latest.step}"
    gap = not_recorded(profiles)
    _title(figure, name, f"{facts}; pale: {gap}" if gap else facts)
    save(figure, folder / HEAT_MAPS)
    figure = _grid(names, lambda axes, quantity: draw_lines(axes, first, step, quantity))
    _title(figure, name, _compared(first, step))
    _explain(figure, first, step)
    save(figure, lines_out)
    return [folder / HEAT_MAPS, lines_out]


def plot_quantity(
    profiles: Sequence[DepthProfile], quantity: str, name: str, folder: Path, shown: DepthProfile
) -> Path:
    """Draw one quantity: its heat map, and a step compared with the first, as `depth_QUANTITY.png`.

    Args:
        profiles: a run's, in the order of their steps.
        quantity: a key of QUANTITIES.
        name: the run's, for the title.
        folder: where to draw.
        shown: the step to compare with the first.
    """
    figure, (left, right) = _panels(1, 2, 5.2, 3.9)
    draw_heat_map(left, profiles, quantity)
    draw_lines(right, profiles[0], shown, quantity)
    _title(figure, name, _compared(profiles[0], shown))
    _explain(figure, profiles[0], shown)
    out = folder / f"depth_{quantity}.png"
    save(figure, out)
    return out


def stacked(profiles: Sequence[DepthProfile], quantity: str) -> Values:
    """A quantity over all steps and depths, [steps, sub_layers]."""
    return np.ma.stack([profile.values[quantity] for profile in profiles])


def draw_heat_map(
    axes: Axes,
    profiles: Sequence[DepthProfile],
    quantity: str,
    norm: Normalize | None = None,
    *,
    colour_bar: bool = True,
) -> None:
    """Draw steps to the right and depth upwards; non-finite values pink, absent values pale.

    Above 128 sub-layers, a row is the mean of a group of sub-layers, and pink if any of them is not
    finite. For quantities of attention only, a row is a block.

    Args:
        axes: where to draw.
        profiles: in the order of their steps.
        quantity: a key of QUANTITIES.
        norm: of the colours; None fits it to the values.
        colour_bar: whether to draw that too.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import to_rgba
    from matplotlib.ticker import MaxNLocator

    values = stacked(profiles, quantity)
    norm = norm or colours(QUANTITIES[quantity], values)
    grid = _grouped(values).T
    mappable = ScalarMappable(norm, "RdBu_r" if quantity == "update_cosine" else "viridis")
    bad = ~np.isfinite(grid.data)
    low, high = norm.vmin or 0.0, norm.vmax or 1.0
    picture = mappable.to_rgba(np.where(bad, low, np.clip(grid.data, low, high)))
    picture[bad] = to_rgba(ALARM)
    picture[np.ma.getmaskarray(grid)] = to_rgba(NOTHING)
    rows = grid.shape[0]
    borders = np.arange(rows + 1) * math.ceil(values.shape[1] / rows)
    steps = [profile.step for profile in profiles]
    axes.pcolorfast(_edges(steps), borders, picture)
    axes.set_ylim(0, values.shape[1])
    axes.set_title(QUANTITIES[quantity].label, loc="left", fontsize=10.5, color=TEXT)
    axes.set_xlabel("step", color=TEXT)
    axes.set_ylabel("sub-layer", color=TEXT)
    axes.set_xticks(_step_ticks(steps[0], steps[-1]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _quiet(axes)
    if colour_bar:
        bar = axes.figure.colorbar(mappable, cax=axes.inset_axes((1.02, 0.0, 0.03, 1.0)))
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=QUIET, labelcolor=TEXT, labelsize=8.5)


def draw_lines(axes: Axes, first: DepthProfile, latest: DepthProfile, quantity: str) -> None:
    """Draw a step (strong) and the first (faint) over depth; attention and FFN apart."""
    for profile, style in (
        (first, {"linewidth": 0.9, "alpha": 0.5, "linestyle": (0, (4, 2))}),
        (latest, {"linewidth": 1.5}),
    ):
        values = profile.values[quantity]
        for start, colour in ((0, BLUE), (1, ORANGE)):
            depth = np.arange(start, profile.sub_layers, 2)
            line = np.ma.masked_invalid(values[start::2])
            if line.count():
                axes.plot(depth, line, color=colour, **style)
    alarm = first_nonfinite(latest.values[quantity])
    if alarm is not None:
        axes.axvspan(alarm, latest.sub_layers, color=ALARM, alpha=0.12, linewidth=0)
        axes.axvline(alarm, color=ALARM, linewidth=1.2)
        axes.annotate(
            f"not finite from {alarm}",
            (alarm, 0.5),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=ALARM,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2},
        )
    _scale(axes, QUANTITIES[quantity], stacked((first, latest), quantity))
    axes.set_title(QUANTITIES[quantity].label, loc="left", fontsize=10.5, color=TEXT)
    axes.set_xlabel("sub-layer", color=TEXT)
    axes.set_xlim(0, max(1, latest.sub_layers - 1))
    dress(axes)


def colours(quantity: Quantity, *values: Values) -> Normalize:
    """The scale of a heat map's colours: logarithmic over decades, symmetric around a cosine's 0.

    At most 12 decades below the largest value have colours of their own.
    """
    from matplotlib.colors import LogNorm, Normalize

    finite = np.concatenate([finite_values(part) for part in values])
    if _is_logarithmic(quantity, finite):
        positive = finite[finite > 0]
        high = float(positive.max())
        return LogNorm(max(float(positive.min()), high * 10.0**-_DECADES), high)
    if not finite.size:
        return Normalize(0.0, 1.0)
    low, high = float(finite.min()), float(finite.max())
    if quantity is QUANTITIES["update_cosine"]:
        size = max(abs(low), abs(high), 1e-3)
        return Normalize(-size, size)
    return Normalize(*_at_least_wide(low, high))


def _is_logarithmic(quantity: Quantity, finite: np.ndarray[Any, Any]) -> bool:
    positive = finite[finite > 0]
    spread = positive.size > 0 and positive.max() >= 10 * finite.min()
    return bool(quantity.scale == "log" and spread)


def _at_least_wide(low: float, high: float) -> tuple[float, float]:
    """A range of at least a tenth of the values' size, so that small variation looks small."""
    missing = max(0.1 * max(abs(low), abs(high)), 1e-12) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def _scale(axes: Axes, quantity: Quantity, values: Values) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    finite = finite_values(values)
    if _is_logarithmic(quantity, finite):
        positive = finite[finite > 0]
        top = math.ceil(math.log10(positive.max()))
        axes.set_yscale("log")
        axes.set_ylim(10.0 ** math.floor(math.log10(positive.min())), 10.0**top)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif finite.size:
        low, high = _at_least_wide(float(finite.min()), float(finite.max()))
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _grouped(values: Values) -> Values:
    """At most 128 rows: means of groups of an even number of neighbours; [steps, rows].

    A group has as many attention as FFN sub-layers, so that they leave no pattern.
    """
    steps, depth = values.shape
    attention_only = depth > 1 and not values[:, 1::2].count()
    if depth <= _ROWS_DRAWN and not attention_only:
        return values
    size = 2 * math.ceil(depth / _ROWS_DRAWN / 2)
    wide = ((0, 0), (0, -depth % size))
    absent = np.pad(np.ma.getmaskarray(values), wide, constant_values=True)
    there = ~absent.reshape(steps, -1, size)
    counts = there.sum(axis=2)
    # Not numpy's masked mean, which would mask what is not finite.
    sums = np.where(there, np.pad(values.data, wide).reshape(there.shape), 0.0).sum(axis=2)
    return np.ma.array(sums / np.maximum(counts, 1), mask=counts == 0)


def _edges(steps: list[int]) -> np.ndarray[Any, Any]:
    """Borders of the columns: the first and the last step, and halfway between the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (np.array(steps[1:]) + np.array(steps[:-1])) / 2
    return np.array([steps[0], *middle, steps[-1]])


def _step_ticks(first: int, last: int) -> list[int]:
    """About five steps to label: the first, the last, and round ones that leave these room."""
    from matplotlib.ticker import MaxNLocator

    room = 0.12 * (last - first)
    found = (round(tick) for tick in MaxNLocator(integer=True, nbins=4).tick_values(first, last))
    between = [tick for tick in found if first + room < tick < last - room]
    return [first, *between, last] if last > first else [first]


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of a width and height in inches, and its panels.

    Placed by hand: a layout engine would take as long as all the rest.
    """
    from matplotlib.figure import Figure

    left, right, bottom, top, between, above = 0.65, 0.75, 0.55, 0.95, 1.15, 0.8
    whole_width = left + columns * width + (columns - 1) * between + right
    whole_height = bottom + rows * height + (rows - 1) * above + top
    figure = Figure(figsize=(whole_width, whole_height), dpi=110, facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=left / whole_width,
        right=1 - right / whole_width,
        bottom=bottom / whole_height,
        top=1 - top / whole_height,
        wspace=between / width,
        hspace=above / height,
    )
    return figure, list(grid.flatten())


def _grid(names: Sequence[str], draw: Callable[[Axes, str], None]) -> Figure:
    rows = math.ceil(len(names) / _COLUMNS)
    figure, panels = _panels(rows, _COLUMNS, 3.1, 2.1)
    for axes, name in zip(panels, names, strict=False):
        draw(axes, name)
    for axes in panels[len(names) :]:
        axes.remove()
    return figure


def _title(figure: Figure, name: str, facts: str) -> None:
    height = figure.get_figheight()
    at = 0.12 / figure.get_figwidth()
    top = 1 - 0.12 / height
    figure.text(at, top, name, va="top", **TITLE)
    figure.text(at, top - 0.3 / height, facts, fontsize=10, color=QUIET, va="top")


def _compared(first: DepthProfile, shown: DepthProfile) -> str:
    return f"{shown.sub_layers} sub-layers, step {shown.step} compared with step {first.step}"


def _explain(figure: Figure, first: DepthProfile, latest: DepthProfile) -> None:
    """The legend of the lines, at the top."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=BLUE, linewidth=1.5, label="attention"),
        Line2D([], [], color=ORANGE, linewidth=1.5, label="FFN"),
        Line2D([], [], color=QUIET, linewidth=1.5, label=f"step {latest.step}"),
        Line2D(
            [], [], color=QUIET, linewidth=0.9, linestyle=(0, (4, 2)), label=f"step {first.step}"
        ),
    ]
    figure.legend(
        handles=handles, loc="upper right", ncols=4, frameon=False, fontsize=10, labelcolor=TEXT
    )


def _quiet(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(color=QUIET, labelcolor=TEXT, labelsize=9)
