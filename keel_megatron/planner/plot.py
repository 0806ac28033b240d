"""Plot of a step: the schedule and the memory of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keel_megatron.planner.simulate import MemoryTrace, Span, Timeline
from keel_megatron.tracking.style import GRID, QUIET, TEXT, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IDLE = "#e9edf2"
_FORWARD, _BACKWARD = ("#90cdf4", "#2b6cb0"), ("#fbd38d", "#dd6b20")
"""Colours of the first and of the last chunk of a stage."""
_LINES_UP_TO = 8
_NUMBERED_UP_TO = 8
_SAMPLES = 1200
_PASSES_ACROSS = 110
_DIGIT = 0.0052
"""Width of a digit, as a fraction of the plot's columns."""


@dataclass(frozen=True)
class _Window:
    """A plotted part of the step, in seconds."""

    start: float
    end: float


def plot_schedule(
    timeline: Timeline,
    memory: list[MemoryTrace],
    *,
    title: str,
    facts: str,
    memory_limit: float | None = None,
) -> bytes:
    """Plot a step: the schedule above, the memory of each stage below.

    A step with many micro-batches is plotted as its beginning and its end.

    Args:
        timeline: the simulated step.
        memory: memory of each stage.
        title: the title.
        facts: one line below the title.
        memory_limit: bytes per device; None: no limit line.

    Returns:
        The picture, as PNG.
    """
    from matplotlib.figure import Figure

    windows = _windows(timeline)
    stages = len(timeline.stages)
    height = min(7.5, 2.2 + 0.42 * stages)
    figure = Figure(figsize=(13, height + 4.6), dpi=130, facecolor="white")
    grid = figure.add_gridspec(
        2,
        len(windows),
        height_ratios=(height, 2.9),
        width_ratios=[window.end - window.start for window in windows],
        left=0.065,
        right=0.9,
        top=1 - 1.25 / (height + 4.6),
        bottom=0.62 / (height + 4.6),
        hspace=0.1,
        wspace=0.045,
    )
    columns = [
        (figure.add_subplot(grid[0, n]), figure.add_subplot(grid[1, n]))
        for n in range(len(windows))
    ]
    scale, unit = (1.0, "s") if timeline.seconds >= 1.0 else (1e3, "ms")
    traces = [_trace(spans, one) for spans, one in zip(timeline.stages, memory, strict=True)]
    for (top, bottom), window in zip(columns, windows, strict=True):
        _draw_passes(top, timeline, window, scale, _DIGIT * len(windows))
        image = _draw_memory(bottom, traces, window, scale, memory_limit)
        for axes in (top, bottom):
            axes.set_xlim(window.start * scale, window.end * scale)
            _dress(axes)
        top.tick_params(labelbottom=False)
    _join(columns)
    _label(figure, columns, stages, unit, image)
    _title(figure, height + 4.6, title, facts, timeline)
    return picture(figure)


def _windows(timeline: Timeline) -> list[_Window]:
    """The whole step, or its warm-up and cool-down with part of the steady state."""
    first = timeline.stages[0]
    filled = next(span.start for span in first if not span.operation.forward)
    mean = sum(end - start for _operation, start, end in first) / len(first)
    part = max(1.4 * filled, 0.5 * _PASSES_ACROSS * mean)
    whole = timeline.seconds
    if 2.2 * part >= whole:
        return [_Window(0.0, whole)]
    return [_Window(0.0, part), _Window(whole - part, whole)]


def _draw_passes(
    axes: Axes, timeline: Timeline, window: _Window, scale: float, digit: float
) -> None:
    """One row per stage; `digit` is a digit's width as a fraction of the window."""
    stages = len(timeline.stages)
    chunks = 1 + max(span.operation.chunk for span in timeline.stages[0])
    colours = {
        forward: _shades(_FORWARD if forward else _BACKWARD, chunks) for forward in (True, False)
    }
    shown = window.end - window.start
    for rank, spans in enumerate(timeline.stages):
        seen = [span for span in spans if span.end > window.start and span.start < window.end]
        narrowest = min((span.end - span.start for span in seen), default=0.0)
        wide = narrowest / shown > 0.004
        axes.broken_barh(
            [(span.start * scale, (span.end - span.start) * scale) for span in seen],
            (rank - 0.43, 0.86),
            facecolors=[colours[span.operation.forward][span.operation.chunk] for span in seen],
            edgecolors="white" if wide else "none",
            linewidth=0.6 if wide else 0.0,
        )
        if stages <= _NUMBERED_UP_TO:
            _number(axes, seen, rank, window, scale, digit * shown)
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_facecolor(_IDLE)


def _number(
    axes: Axes, seen: list[Span], rank: int, window: _Window, scale: float, digit: float
) -> None:
    """Label a pass with its micro-batch number, where it is wide enough."""
    for (_forward, _chunk, micro_batch), start, end in seen:
        start, end = max(start, window.start), min(end, window.end)
        if end - start < digit * (0.9 + len(str(micro_batch))):
            continue
        middle = 0.5 * (start + end) * scale
        axes.text(
            middle, rank, str(micro_batch), ha="center", va="center", fontsize=6.5, color=TEXT
        )


def _shades(ends: tuple[str, str], count: int) -> list[Any]:
    """One colour per chunk, from light to dark; a single chunk gets the middle one."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("chunks", ends)
    return [shades(0.55 if count == 1 else chunk / (count - 1)) for chunk in range(count)]


def _trace(spans: tuple[Span, ...], memory: MemoryTrace) -> tuple[Any, Any]:
    """Times at which a stage's memory changes, and the bytes after each."""
    changes = [(0.0, memory.constant)]
    for (forward, chunk, _micro_batch), start, end in spans:
        # A forward pass adds activations gradually; a backward pass frees them gradually.
        changes.append((start, memory.chunks[chunk]) if forward else (end, -memory.chunks[chunk]))
    changes.sort(key=lambda change: change[0])
    times, amounts = np.array(changes).T
    return times, np.cumsum(amounts)


def _at(trace: tuple[Any, Any], moments: Any) -> Any:
    """Memory of a stage at some moments, bytes."""
    times, amounts = trace
    return amounts[np.searchsorted(times, moments, side="right") - 1]


def _draw_memory(
    axes: Axes,
    traces: list[tuple[Any, Any]],
    window: _Window,
    scale: float,
    limit: float | None,
) -> Any:
    """Lines for a few stages, a heat map for many; returns the heat map for its colour bar."""
    moments = np.linspace(window.start, window.end, _SAMPLES)
    sampled = np.array([_at(trace, moments) for trace in traces]) / 1e9
    peaks = np.array([amounts.max() for _times, amounts in traces]) / 1e9
    if len(traces) > _LINES_UP_TO:
        axes.set_ylim(len(traces) - 0.5, -0.5)
        return axes.imshow(
            sampled,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=0.0,
            vmax=peaks.max(),
            extent=(window.start * scale, window.end * scale, len(traces) - 0.5, -0.5),
        )
    for rank, (line, colour) in enumerate(zip(sampled, _line_colours(len(traces)), strict=True)):
        axes.plot(moments * scale, line, color=colour, linewidth=1.5, label=f"stage {rank}")
    top = peaks.max()
    if limit is not None and limit / 1e9 < 2.5 * top:
        dashes = (0, (5, 3))
        axes.axhline(limit / 1e9, color=TEXT, linestyle=dashes, linewidth=1.1, label="limit")
        top = max(top, limit / 1e9)
    axes.set_ylim(0, 1.12 * top)
    return None


def _line_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * rank / max(1, count - 1)) for rank in range(count)]


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(color=QUIET, labelcolor=TEXT, labelsize=9)


def _join(columns: list[tuple[Axes, Axes]]) -> None:
    """Only the first column has a left axis; a gap marks the omitted middle."""
    for top, bottom in columns[1:]:
        for axes in (top, bottom):
            axes.tick_params(left=False, labelleft=False)
        bottom.set_ylim(columns[0][1].get_ylim())
        top.annotate(
            "…",
            (0, 0.5),
            xycoords="axes fraction",
            xytext=(-13, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=16,
            color=QUIET,
            annotation_clip=False,
        )


def _label(
    figure: Figure, columns: list[tuple[Axes, Axes]], stages: int, unit: str, image: Any
) -> None:
    """Axis labels, and the memory's colour bar on the right."""
    top, bottom = columns[0]
    every = max(1, -(-stages // 16))
    for axes in (top, bottom) if image is not None else (top,):
        axes.set_yticks(range(0, stages, every))
    top.set_ylabel("stage", color=TEXT)
    bottom.set_ylabel("stage" if image is not None else "memory (GB)", color=TEXT)
    figure.supxlabel(
        f"{unit} from the start of the step", fontsize=10, color=TEXT, x=0.48, y=0.008, va="bottom"
    )
    last = columns[-1][1]
    if image is None:
        bottom.grid(axis="y", color=GRID, linewidth=0.8)
        for other in columns[1:]:
            other[1].grid(axis="y", color=GRID, linewidth=0.8)
        handles, names = last.get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="center left",
            bbox_to_anchor=(0.91, _middle(last)),
            frameon=False,
            fontsize=9,
            labelcolor=TEXT,
        )
        return
    box = last.get_position()
    bar = figure.add_axes((0.915, box.y0, 0.012, box.height))
    figure.colorbar(image, cax=bar)
    bar.set_title("GB", fontsize=9, color=TEXT, pad=5)
    bar.tick_params(color=QUIET, labelcolor=TEXT, labelsize=9)
    for spine in bar.spines.values():
        spine.set_visible(False)


def _middle(axes: Axes) -> float:
    box = axes.get_position()
    return 0.5 * (box.y0 + box.y1)


def _title(figure: Figure, inches: float, title: str, facts: str, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    def from_top(distance: float) -> float:
        return 1.0 - distance / inches

    plain: dict[str, Any] = {"va": "top", "parse_math": False}  # a path may have a $
    figure.text(0.065, from_top(0.2), title, fontsize=15, fontweight="bold", color=TEXT, **plain)
    figure.text(0.065, from_top(0.56), facts, fontsize=10, color=QUIET, **plain)
    chunks = 1 + max(span.operation.chunk for span in timeline.stages[0])
    entries = []
    for name, ends in (("forward", _FORWARD), ("backward", _BACKWARD)):
        shades = _shades(ends, chunks)
        label = name if chunks == 1 else f"{name}, first chunk"
        entries.append(Patch(facecolor=shades[0], label=label))
        if chunks > 1:
            entries.append(Patch(facecolor=shades[-1], label=f"{name}, last chunk"))
    entries.append(Patch(facecolor=_IDLE, edgecolor=GRID, label="idle"))
    figure.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0.058, from_top(0.83)),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        labelcolor=TEXT,
        handlelength=1.2,
        columnspacing=1.6,
    )
