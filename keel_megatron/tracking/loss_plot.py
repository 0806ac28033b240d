"""Plot of a run: loss over tokens, gradient norm below."""

from __future__ import annotations

import math
from bisect import bisect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel_megatron.errors import UserError
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.tracking.style import BLUE, ORANGE, QUIET, SLATE, TEXT, TITLE, dress, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHED_FROM = 50
_UNITS = ((1e12, "trillion tokens"), (1e9, "billion tokens"), (1e6, "million tokens"))

Series = tuple[list[float], list[float]]


def plot_loss(run_folder: Path, out: Path, unigram_entropy: float | None) -> None:
    """Draw metrics.jsonl of a run's folder into a PNG.

    Args:
        run_folder: the run's folder.
        out: the picture.
        unigram_entropy: loss of a unigram model, in nats per token; drawn as a line.

    Raises:
        UserError: the run has no steps.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    path = run_folder / "metrics.jsonl"
    records = read_metrics(path)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise UserError(f"{path} has no steps to draw")
    validations = [record for record in records if "validation_loss" in record]
    scale, unit = _unit(steps[-1]["consumed_tokens"])
    validation = _series(validations, "validation_loss", scale)

    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08, hspace=0.04)
    figure = Figure(figsize=(8.4, 5.4), dpi=150, facecolor="white", layout=layout)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    training = _series(steps, "loss", scale)
    _draw_loss(top, training, validation)
    if unigram_entropy is not None:
        _draw_entropy(top, unigram_entropy, training, validation)
    top.legend(loc="upper right", frameon=False, fontsize=9.5, labelcolor=TEXT)
    _draw_norm(bottom, _series(steps, "grad_norm", scale))
    bottom.set_xlabel(unit, color=TEXT)
    bottom.set_xlim(0, steps[-1]["consumed_tokens"] / scale * 1.02)
    for axes in (top, bottom):
        dress(axes)
    figure.align_ylabels()
    _title(figure, run_folder.resolve().name, steps[-1], validation[1], unigram_entropy)

    save(figure, out)


def smoothed(values: list[float]) -> list[float]:
    """Moving average over about a twentieth of the run, centred, so that it does not lag.

    The window narrows at the start, and looks only back at the end. Non-finite values are excluded
    and stay non-finite.
    """
    half = max(1, len(values) // 40)
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index, value in enumerate(values):
        back = min(half, index)
        first, end = index - back, index + min(back, len(values) - 1 - index) + 1
        mean = (sums[end] - sums[first]) / max(1, counts[end] - counts[first])
        means.append(mean if math.isfinite(value) else math.nan)
    return means


def _draw_loss(axes: Axes, training: Series, validation: Series) -> None:
    tokens, losses = training
    if len(losses) >= _SMOOTHED_FROM:
        axes.plot(tokens, losses, color=BLUE, linewidth=0.8, alpha=0.3)
        axes.plot(
            tokens,
            smoothed(losses),
            color=BLUE,
            linewidth=2,
            label="training (faint: each step)",
        )
    else:
        axes.plot(tokens, losses, color=BLUE, linewidth=2, label="training")
    if validation[1]:
        axes.plot(
            *validation,
            color=ORANGE,
            linewidth=1.4,
            marker="o",
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=1.2,
            label="validation",
            zorder=4,
        )
    axes.set_ylabel("loss (nats per token)", color=TEXT)


def _draw_entropy(axes: Axes, entropy: float, training: Series, validation: Series) -> None:
    """Draw the line, with its label above the right or below the left end, where there is room."""
    axes.axhline(entropy, color=TEXT, linestyle=(0, (5, 3)), linewidth=1.1, zorder=3)
    cut = 0.7 * training[0][-1]
    right_is_free = all(
        loss < entropy
        for tokens, losses in (training, validation)
        for loss in losses[max(0, bisect(tokens, cut) - 1) :]  # with the segment that crosses it
    )
    axes.annotate(
        f"unigram entropy {entropy:.3f}",
        (1 if right_is_free else 0, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 5) if right_is_free else (6, -5),
        textcoords="offset points",
        ha="right" if right_is_free else "left",
        va="bottom" if right_is_free else "top",
        fontsize=9.5,
        color=TEXT,
    )


def _draw_norm(axes: Axes, norms: Series) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.plot(*norms, color=SLATE, linewidth=0.9)
    positive = [norm for norm in norms[1] if 0 < norm < math.inf]
    if positive:  # whole decades, so that a flat curve looks flat
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        axes.set_yscale("log")
        axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("gradient norm", color=TEXT)


def _title(
    figure: Figure,
    name: str,
    last: dict[str, Any],
    validation: list[float],
    entropy: float | None,
) -> None:
    """The run's name and progress."""
    facts = [f"{last['step']:,} steps"]
    if validation:
        facts.append(f"validation loss {validation[-1]:.3f}")
        if entropy is not None and math.isfinite(validation[-1]):
            distance = entropy - validation[-1]
            where = "below" if distance >= 0 else "above"
            facts.append(f"{abs(distance):.2f} nats {where} the unigram entropy")
    axes = figure.axes[0]
    axes.set_title(name, loc="left", pad=24, **TITLE)
    axes.annotate(
        ",  ".join(facts),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        fontsize=10,
        color=QUIET,
    )


def _series(records: list[dict[str, Any]], key: str, scale: float) -> Series:
    """Tokens in units of `scale`, and values."""
    return (
        [record["consumed_tokens"] / scale for record in records],
        [record[key] for record in records],
    )


def _unit(tokens: float) -> tuple[float, str]:
    """A readable unit for this number of tokens."""
    return next((unit for unit in _UNITS if tokens >= unit[0]), (1e3, "thousand tokens"))
