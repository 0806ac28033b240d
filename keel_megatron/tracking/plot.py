"""The picture of a run: loss over tokens, gradient norm below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keel_megatron.tracking.metrics import read_metrics

_LOSS, _HELD_OUT, _NORM, _GREY = "#2563a8", "#d9541e", "#4a7c59", "#777777"


def plot_loss(run_folder: Path, out: Path, unigram_entropy: float | None = None) -> None:
    """Draw metrics.jsonl of a run's folder into a PNG.

    Args:
        run_folder: the run's folder.
        out: the picture.
        unigram_entropy: nats per token that counting tokens alone reaches; drawn as a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    records = read_metrics(run_folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    held_out = [record for record in records if "validation_loss" in record]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(*_series(steps, "loss"), color=_LOSS, linewidth=1, label="training loss")
    top.plot(
        *_series(held_out, "validation_loss"),
        color=_HELD_OUT,
        marker="o",
        markersize=5,
        linewidth=1.2,
        label="validation loss",
    )
    if unigram_entropy is not None:
        top.axhline(unigram_entropy, color=_GREY, linestyle="--", linewidth=1)
        top.annotate(
            f"unigram entropy {unigram_entropy:.2f}",
            (1.0, unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=_GREY,
            fontsize=9,
        )
    top.set_ylabel("nats per token")
    top.set_title(run_folder.name, loc="left", fontweight="bold")
    top.legend(frameon=False)
    bottom.plot(*_series(steps, "grad_norm"), color=_NORM, linewidth=0.8)
    bottom.set_yscale("log")
    bottom.yaxis.set_minor_formatter(NullFormatter())
    bottom.set_ylabel("grad norm")
    bottom.set_xlabel("million tokens")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Million tokens and values."""
    return (
        [record["consumed_tokens"] / 1e6 for record in records],
        [record[key] for record in records],
    )
