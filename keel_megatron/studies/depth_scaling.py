"""Loss over depth at fixed width, each rule at its own best rate (arXiv 2601.19895, Table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel_megatron.studies import pictures
from keel_megatron.studies.best_rate import EDGE, best_rates, check_rates, loss_key
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.results import Spread, groups, markdown, paired_difference, spread
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.records import EVALUATION
from keel_megatron.tracking.run_log import METRICS_FILE

RULES = ("keel", "pre_ln")
"""The paper's Table 3 compares these."""
_BASELINE = "pre_ln"


def study(
    axes: Axes,
    rates: Sequence[float],
    given: Mapping[str, float] | None = None,
) -> Study:
    """The study's grid; the last results of `evaluation.tasks`, if any, are columns too.

    Args:
        axes: rules (default: keel and pre_ln) and depths.
        rates: the sweep.
        given: rules that have one rate instead of the sweep.

    Raises:
        UserError: a rate is not positive, or a depth is odd.
    """
    own = dict(given or {})
    check_rates([*rates, *own.values()])

    def point(rule: str, sub_layers: int, rate: float) -> Point:
        overrides = {"model.residual": rule, **depth(sub_layers), "optimizer.learning_rate": rate}
        labels: dict[str, Label] = {"rule": rule, "sub_layers": sub_layers, "rate": rate}
        return Point(f"{rule}-{sub_layers}-lr{rate:g}", overrides, labels)

    points = [
        point(rule, sub_layers, rate)
        for sub_layers in axes.depths
        for rule in axes.rules or RULES
        for rate in ([own[rule]] if rule in own else rates)
    ]
    return Study("depth-scaling", points, table, picture, lambda _point, folder: row(folder))


def row(folder: Path) -> dict[str, Any]:
    """The last result of each evaluation task of a run."""
    found: dict[str, Any] = {}
    for record in iterate_metrics(folder / METRICS_FILE):
        found |= {key: value for key, value in record.items() if key.startswith(EVALUATION)}
    return found


def table(rows: Sequence[Row]) -> str:
    """One line per depth and rule at its best rate, with the difference from pre_ln."""
    best = best_rates(rows, "sub_layers", "rule")
    key = loss_key(rows)
    tasks = sorted({name for row in rows for name in row if name.startswith(EVALUATION)})
    lines = []
    for (sub_layers, rule), one in sorted(best.items(), key=lambda item: item[0]):
        if one is None:
            lines.append(
                [sub_layers, rule, "-", "diverged at every rate", "-", *("-" for _ in tasks)]
            )
            continue
        base = best.get((sub_layers, _BASELINE))
        compared = paired_difference(one.rows, base.rows, key) if base and rule != _BASELINE else ""
        results = [one.loss(name) for name in tasks]
        lines.append([sub_layers, rule, one.shown, one.loss(key), compared, *results])
    names = [name.removeprefix(EVALUATION) for name in tasks]
    columns = ["sub-layers", "rule", "best rate", key.replace("_", " "), "against pre_ln", *names]
    return f"{markdown(columns, lines)}\n\n{EDGE}"


def picture(rows: Sequence[Row], out: Path) -> None:
    """Loss over depth, one line per rule at its best rates; beside it, or alone, loss over rate."""
    depths = groups(rows, "sub_layers")
    panels = 2 if len(depths) > 1 else 1
    title = "Loss over depth, at each rule's best rate" if panels > 1 else "Loss over learning rate"
    figure, axes = pictures.new_figure(title, panels)
    if panels > 1:
        _over_depth(axes[0], rows)
    sweep(axes[-1], rows, "sub_layers")
    if panels > 1:
        pictures.marker_legend(axes[-1], [f"L = {depth}" for (depth,) in depths])
    axes[0].set_ylabel(f"{loss_key(rows).replace('_', ' ')}, nats per token")
    pictures.finish(figure, out)


def _over_depth(axes: Any, rows: Sequence[Row]) -> None:
    """Loss over depth, one line per rule at its best rates."""
    key, best = loss_key(rows), best_rates(rows, "rule", "sub_layers")
    for rule in dict.fromkeys(row["rule"] for row in rows):
        known = [(at, one) for (name, at), one in best.items() if name == rule and one is not None]
        losses = [one.loss(key) for _at, one in known]
        colour = pictures.rule_colour(rule)
        pictures.curve(axes, [at for at, _one in known], losses, rule, colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.set_xlabel("sub-layers L")


def sweep(axes: Any, rows: Sequence[Row], shape: str) -> None:
    """Draw loss over learning rate, one line per rule and shape: its colour and its marker.

    Args:
        axes: to draw in.
        rows: with labels `rule`, `rate` and the shape's.
        shape: the label that tells shapes apart.
    """
    key = loss_key(rows)
    shapes = list(dict.fromkeys(row[shape] for row in rows))
    for rule in dict.fromkeys(row["rule"] for row in rows):
        for number, one in enumerate(shapes):
            some = [row for row in rows if row["rule"] == rule and row[shape] == one]
            by_rate: dict[float, Spread] = {
                rate: spread([row for row in some if row["rate"] == rate], key)
                for rate in sorted({row["rate"] for row in some})
            }
            if len(by_rate) > 1:
                marker = pictures.MARKERS[number % len(pictures.MARKERS)]
                colour = pictures.rule_colour(rule)
                label = rule if number == 0 else "_"
                pictures.curve(axes, list(by_rate), list(by_rate.values()), label, colour, marker)
    pictures.rate_axis(axes, {row["rate"] for row in rows})
