"""Table, picture and results.json of the study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from keel_megatron.studies.pictures import finish, new_figure, rule_colour
from keel_megatron.studies.redundancy.outcome import CHEAP, CHEAP_LOSS, Outcome, different_texts
from keel_megatron.studies.results import markdown, write_results, write_table
from keel_megatron.tracking.style import QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "redundancy.png"
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
    write_results("redundancy", out, [one.row() for one in found])
    write_table(out, text)
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
                f"{np.nanmedian(one.errors):.4f}",
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
    """Loss added over the relative depth, and the angular distance; one line a run.

    Raises:
        OSError: it cannot be written.
    """
    unit, removal = found[0].subject.unit, found[0].subject.removal
    figure, (left, right) = new_figure(
        f"What one {unit} is worth", 2, f"removed: {_REMOVED[removal]}"
    )
    styles = _styles(found)
    floor = _floor(found)
    for one, (colour, line, label) in zip(found, styles, strict=True):
        share = f"{one.cheap:.0%} of {unit}s below the line"
        left.plot(
            one.depths,
            np.clip(np.where(np.isfinite(one.added), one.added, np.nan), floor, None),
            color=colour,
            linestyle=line,
            linewidth=1.8,
            label=f"{label}: {share}",
        )
        right.plot(one.depths, one.angles, color=colour, linestyle=line, linewidth=1.8)
    left.axhline(CHEAP_LOSS, color=QUIET, linewidth=1.2, linestyle=(0, (4, 3)))
    for axes, name in ((left, "added loss, nats per token"), (right, "angular distance / pi")):
        _depth_axis(axes)
        axes.set_ylabel(name)
    finish(figure, out)


def _depth_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("relative depth")


def _floor(found: list[Outcome]) -> float:
    """What is drawn for removals that add less, or nothing: no less can be told from 0."""
    errors = np.concatenate([one.errors for one in found])
    error = float(np.nanmedian(errors)) if np.isfinite(errors).any() else 0.0
    return max(1e-5, error)


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
