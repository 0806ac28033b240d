"""Table, picture and results.json of the study."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from keel_megatron.runtime import machines
from keel_megatron.studies.pictures import finish, new_figure, rule_colour
from keel_megatron.studies.redundancy.outcome import CHEAP, CHEAP_LOSS, Outcome, different_texts
from keel_megatron.studies.redundancy.records import FOLDER
from keel_megatron.studies.results import PICTURE, markdown, write_results, write_table
from keel_megatron.tracking.style import SLATE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REMOVED = {
    "sub-layer": "skipped with its norm",
    "branch": "with its branch at zero, its outer norm kept",
}


def write_report(found: list[Outcome], out: Path) -> str:
    """Write results.json, table.md and the picture; the table.

    Raises:
        OSError: a file cannot be written.
    """
    text = table(found)
    rows = [one.row() for one in found]
    machine = machines.named(machines.recorded(out / FOLDER))
    write_results("redundancy", out, rows, machine=machine)
    write_table(out, text, rows, machine)
    picture(found, out / PICTURE)
    return text


def table(found: list[Outcome]) -> str:
    """Markdown: a line a run; what the columns mean; and on which text."""
    rows = []
    for one in found:
        worst = int(one.added.argmax())
        rows.append(
            [
                one.subject.run,
                one.subject.residual,
                one.subject.sub_layers,
                one.subject.step,
                f"{one.loss:.4f}",
                f"{one.perplexity:.2f}",
                f"{one.cheap:.0%}",
                f"{one.cheap_in_loss:.0%}",
                *(f"{part:.4f}" for part in one.quarters()),
                f"{one.added[worst]:.2f} ({worst})",
                f"{one.error:.4f}" if one.error else "-",
                f"{np.median(one.angles):.4f}",
            ]
        )
    columns = [
        *("run", "rule", "L", "step", "loss", "perplexity"),
        *(f"below {CHEAP:.0%} of perplexity", f"below {CHEAP:.0%} of loss"),
        *("added, 1st quarter", "2nd", "3rd", "4th"),
        *("most (at)", "standard error", "angular distance"),
    ]
    unit = found[0].subject.unit
    remark = different_texts(found)
    texts = dict.fromkeys(
        f"{one.subject.sequences} x {one.subject.length} tokens of {one.subject.text}"
        for one in found
    )
    lines = [
        f"One {unit} removed: {_REMOVED[found[0].subject.removal]}. Added: to the loss, nats per "
        "token, median of a quarter of the depth. Standard error of what one removal adds, over "
        "the sequences, and angular distance before and after a unit, as a part of pi: medians.",
        f"Text: {'; '.join(texts)}.",
        *([remark] if remark else []),
    ]
    return "\n\n".join([markdown(columns, rows), *lines])


def picture(found: list[Outcome], out: Path) -> None:
    """Loss added over the relative depth, and the angular distance; a colour a run.

    Thin: every unit. Thick: their geometric mean over about a sixteenth of the depth. What is less
    than the standard error is drawn at it.

    Raises:
        OSError: it cannot be written.
    """
    unit, removal = found[0].subject.unit, found[0].subject.removal
    note = (
        f"removed: {_REMOVED[removal]}; thick: geometric mean over neighbours; values below the "
        "standard error are drawn at it"
    )
    figure, (left, right) = new_figure(f"What one {unit} is worth", 2, note)
    for one, (colour, line, label) in zip(found, _styles(found), strict=True):
        text = f"{label}: {one.cheap:.0%} below the line"
        _curve(left, one.depths, np.maximum(one.added, one.error or 1e-6), colour, line, text)
        _curve(right, one.depths, np.maximum(one.angles, 1e-7), colour, line, text)
    left.axhline(CHEAP_LOSS, color=SLATE, linewidth=1.4, linestyle=(0, (4, 3)))
    left.annotate(
        f"+{CHEAP:.0%} perplexity",
        (0.99, CHEAP_LOSS),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=11,
        color=SLATE,
    )
    for axes, name in (
        (left, "loss added by its removal, nats a token"),
        (right, "angle between the streams\nbefore and after it, / $\\pi$"),
    ):
        axes.set_yscale("log")
        axes.set_xlim(0, 1)
        axes.set_xlabel("relative depth")
        axes.set_ylabel(name)
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** (0.05 + 0.06 * len(found)))  # room for the legend
    left.legend(loc="upper right", frameon=False, fontsize=11, labelcolor=TEXT)
    finish(figure, out, legend=False)


def _curve(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], colour: str, line: str, label: str
) -> None:
    """A curve as `picture` says; values that are not finite are left out."""
    y = np.where(np.isfinite(y), y, np.nan)
    reach = max(1, len(y) // 32)
    axes.plot(x, y, color=colour, linestyle=line, linewidth=1.0, alpha=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a part without any finite value
        # Over as many on both sides: the ends stay as they are.
        reaches = [min(reach, n, len(y) - 1 - n) for n in range(len(y))]
        smooth = [np.exp(np.nanmean(np.log(y[n - r : n + r + 1]))) for n, r in enumerate(reaches)]
    axes.plot(x, smooth, color=colour, linestyle=line, linewidth=2.6, label=label)


def _styles(found: list[Outcome]) -> list[tuple[str, str, str]]:
    """Colour, line and label of each run."""
    lines = ("-", "--", ":", "-.")
    styles, seen = [], dict[str, int]()
    labels = [one.label for one in found]
    for one in found:
        rule = one.subject.residual
        line = lines[seen.get(rule, 0) % len(lines)]
        seen[rule] = seen.get(rule, 0) + 1
        label = one.label if labels.count(one.label) == 1 else f"{one.subject.run} ({one.label})"
        styles.append((rule_colour(rule), line, label))
    return styles
