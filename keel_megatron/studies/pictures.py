"""Style that the studies' pictures share: legible when projected, one colour per residual rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keel_megatron.architecture.residual import RULES
from keel_megatron.studies.grid import Row
from keel_megatron.studies.results import Spread, groups
from keel_megatron.tracking.style import BLUE, ORANGE, QUIET, SLATE, TEXT, TITLE, dress, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    *(BLUE, ORANGE, "#2f855a", "#805ad5", "#b83280", SLATE, "#0f766e", "#a16207"),
    *("#0ea5c6", "#c53030", "#65a30d", TEXT),
)
MARKERS = "osD^vPXh"


def rule_colour(rule: str) -> str:
    """The colour of a residual rule, the same in every study."""
    return COLOURS[list(RULES).index(rule) % len(COLOURS)]


def new_figure(
    title: str, panels: int = 1, note: str = "", rows: int = 1, side: float = 5.2
) -> tuple[Figure, list[Axes]]:
    """A figure with panels beside each other.

    Args:
        title: of the whole figure.
        panels: number of axes in a row.
        note: small text below: the size of the runs, the number of seeds.
        rows: of axes, which are returned row by row.
        side: of one of several panels, in inches; smaller where there are many, so that the text
            stays large enough when the figure is shown in a page's width.
    """
    from matplotlib.figure import Figure

    width = 8.6 if panels == 1 else side * panels + 0.8
    figure = Figure(figsize=(width, side * rows), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", **TITLE)
    axes = list(figure.subplots(rows, panels, squeeze=False).flat)
    if note:
        figure.supxlabel(note, x=0.02, ha="left", fontsize=10, color=QUIET, parse_math=False)
    return figure, axes


def seeds_note(rows: Sequence[Row]) -> str:
    """What points and bars of `curve` are: of one seed, or of several."""
    seeds = len(groups(rows, "seed"))
    if seeds == 1:
        return "one seed"
    return f"mean over {seeds} seeds, bars: one standard deviation"


def curve(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[Spread],
    label: str,
    colour: str,
    marker: str = "o",
    style: str = "-",
) -> None:
    """A line over means, with bars of one standard deviation where there are several seeds."""
    known = [(at, one) for at, one in zip(x, y, strict=True) if one.n]
    bars = [one.deviation if one.n > 1 else 0.0 for _at, one in known]
    axes.errorbar(
        [at for at, _one in known],
        [one.mean for _at, one in known],
        yerr=bars if any(bars) else None,
        label=label,
        color=colour,
        marker=marker,
        linestyle=style,
        markersize=6,
        linewidth=2.2,
        elinewidth=1.2,
        capsize=3,
    )


def rate_axis(axes: Axes, rates: Collection[float]) -> None:
    """Make the x axis one of learning rates, with a tick at each rate of a sweep."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")


def marker_legend(axes: Axes, names: Sequence[str]) -> None:
    """A legend of MARKERS alone, where another panel's legend names the colours."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=QUIET, marker=MARKERS[number % len(MARKERS)], label=name)
        for number, name in enumerate(names)
    ]
    axes.legend(handles=lines, frameon=False, fontsize=11, labelcolor=TEXT)


def shared_legend(figure: Figure, columns: int = 4) -> None:
    """One legend below all panels, of what the first one shows."""
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower right",
        ncols=columns,
        frameon=False,
        handlelength=3.5,  # long enough to tell dashed lines
        fontsize=11,
        labelcolor=TEXT,
    )


def finish(figure: Figure, out: Path, *, legend: bool = True) -> None:
    """Dress every panel, give the first one a legend, and write the PNG.

    Raises:
        OSError: it cannot be written.
    """
    for axes in figure.axes:
        dress(axes)
        axes.tick_params(labelsize=11)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_fontsize(12)
            label.set_color(TEXT)
    if legend and figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(frameon=False, fontsize=11, labelcolor=TEXT)
    save(figure, out)
