"""Table and plot of the gradient-flow study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from keel_megatron.runtime.machines import this_machine
from keel_megatron.studies.gradient_flow import FIRST, GradientFlow
from keel_megatron.studies.results import (
    PICTURE,
    RESULTS,
    TABLE,
    markdown,
    write_results,
    write_table,
)
from keel_megatron.tracking.style import BLUE, ORANGE, SLATE, TEXT, dress, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (BLUE, ORANGE, "#2f855a", "#805ad5", "#b83280", SLATE)


def flow_table(flows: Sequence[GradientFlow]) -> str:
    """One line per model: the skip path's product from x_2 to x_L, measured and predicted."""
    rows = []
    for flow in flows:
        measured, predicted = flow.skip[0], flow.predicted[0]
        ratio = math.log(measured) / math.log(predicted) if predicted < 0.9 else math.nan
        shown = f"{ratio:.3f}" if math.isfinite(ratio) else "-"
        numbers = [f"{measured:.3e}", f"{predicted:.3e}", shown, f"{flow.loss[0]:.3e}"]
        rows.append([flow.residual, flow.sub_layers, *numbers])
    columns = ["rule", "sub-layers", "measured", "predicted", "ratio of logarithms"]
    return markdown([*columns, "loss gradient, x_2 / x_L"], rows)


def save_flows(flows: Sequence[GradientFlow], out: Path) -> list[str]:
    """Write results.json, table.md and the picture; lines that show them.

    Raises:
        OSError: one of them cannot be written.
    """
    table = flow_table(flows)
    rows, machine = [asdict(flow) for flow in flows], str(this_machine())
    write_results("gradient-flow", out, rows, machine=machine)
    write_table(out, table, rows, machine)
    plot_flows(flows, out / PICTURE)
    return [table, f"{out / RESULTS}, {out / TABLE}, {out / PICTURE}"]


def plot_flows(flows: Sequence[GradientFlow], out: Path) -> None:
    """Plot one column per depth: the skip path above, the whole gradient of the loss below."""
    from matplotlib.figure import Figure

    depths = sorted({flow.sub_layers for flow in flows})
    rules = list(dict.fromkeys(flow.residual for flow in flows))
    figure = Figure(figsize=(3.9 * len(depths) + 0.6, 6.4), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(depths), sharex="col", squeeze=False)
    for column, depth in enumerate(depths):
        top, bottom = grid[0][column], grid[1][column]
        top.set_title(f"L = {depth} sub-layers", fontsize=11, color=TEXT, loc="left")
        for flow in (flow for flow in flows if flow.sub_layers == depth):
            colour = _COLOURS[rules.index(flow.residual) % len(_COLOURS)]
            l = range(FIRST, depth + 1)
            # The first rule's line is wide, so that it shows below others.
            width = 4.0 if flow.residual == rules[0] else 1.8
            top.plot(l, flow.skip, color=colour, linewidth=width, label=flow.residual)
            top.plot(l, flow.predicted, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
            bottom.plot(l, flow.loss, color=colour, linewidth=width)
        bottom.set_xlabel("sub-layer l", color=TEXT)
        for axes in (top, bottom):
            _log_scale(axes)
    grid[0][0].plot([], [], color=TEXT, linewidth=1, linestyle=(0, (4, 3)), label="predicted")
    grid[0][0].legend(frameon=False, fontsize=9.5, labelcolor=TEXT, loc="lower right")
    grid[0][0].set_ylabel("skip path alone\n|d x_L / d x_l|", color=TEXT)
    grid[1][0].set_ylabel("whole gradient of the loss\nat x_l, relative to x_L", color=TEXT)
    save(figure, out)


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 100:  # keep a flat curve flat
        middle = math.sqrt(low * high)
        low, high = middle / 10, middle * 10
        axes.set_ylim(low, high)
    exponents = MaxNLocator(6, integer=True).tick_values(math.log10(low), math.log10(high))
    axes.yaxis.set_major_locator(FixedLocator([10.0**e for e in exponents if e > -300]))
    dress(axes)
