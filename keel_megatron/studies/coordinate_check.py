"""Sizes of activations, gradients and updates in the first steps, over depth and over depths.

A coordinate check: a few steps of training at several depths and one width, with a depth profile
each step. A rule whose settings transfer over depth has sizes that do not depend on the number of
sub-layers L; where they do, `exponents` gives p of L^p. A gradient's size beside AdamW's epsilon,
and runs with other epsilons, say whether epsilon has to shrink with depth (arXiv 2505.01618).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from keel_megatron.architecture.residual import RULES, epsilon_scale
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.studies import pictures
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.over_depth import grouped, mean_curve, thinned
from keel_megatron.studies.results import Spread, groups, markdown, paired_difference, spread
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.run_log import METRICS_FILE

STEPS = 10
"""The paper's coordinate checks have as many."""
MEASURED: Mapping[str, str] = {
    "stream_rms": "stream RMS",
    "branch_rms": "branch RMS",
    "update_size": "branch / skip path",
    "update_to_weight": "update / weights",
    "gradient_rms": "gradient RMS",
}
"""Quantities of a depth profile and their titles. Of the stream the last sub-layer counts, of the
rest the median over the blocks after the first, a block being the mean of attention and FFN, which
differ. Gradients are those of the matrices, clipped as AdamW gets them."""


def study(
    config: RunConfig, axes: Axes, steps: int = STEPS, epsilons: Sequence[str] = ("1",)
) -> Study:
    """The study's grid.

    Args:
        config: the configuration of all runs.
        axes: rules (default: all) and depths.
        steps: steps of a run, all of them at `optimizer.learning_rate`.
        epsilons: factors of `optimizer.epsilon`, each a number, or a number over L as in `1/L`;
            the first is that of the sizes in table and picture.

    Raises:
        UserError: a factor is not positive, or a depth is odd.
    """
    factors = {text: _factor(text) for text in epsilons}
    points = [
        _point(config, rule, sub_layers, steps, factor(sub_layers))
        for rule in axes.rules or tuple(RULES)
        for sub_layers in axes.depths
        for factor in factors.values()
    ]
    unique: dict[str, Point] = {}
    for point in points:  # a factor may be given twice, or differ in later digits
        if unique.setdefault(point.name, point) != point:
            name = f"{point.name}-{point.labels['epsilon']!r}"
            unique[name] = replace(point, name=name)
    row = partial(measured, clip=config.optimizer.clip_grad)
    return Study("coordinate-check", list(unique.values()), table, picture, row)


def _factor(text: str) -> Callable[[int], float]:
    """A value of --epsilons, as a function of L."""
    number, over, rest = text.partition("/")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf or (over and rest != "L"):
        raise UserError(f"--epsilons: {text} must be a positive number, or one over L such as 1/L")
    return lambda sub_layers: value / sub_layers if over else value


def _point(config: RunConfig, rule: str, sub_layers: int, steps: int, factor: float) -> Point:
    epsilon = config.optimizer.epsilon * factor
    overrides: dict[str, Any] = {
        "model.residual": rule,
        **depth(sub_layers),
        "optimizer.epsilon": epsilon,
        "schedule.warmup_steps": 0,
        "schedule.decay": "constant",
        "training.steps": steps,
        "tracking.depth_every": 1,
        "guard.action": "off",
    }
    model = config.model.model_copy(update={"residual": rule, "blocks": sub_layers // 2})
    labels: dict[str, Label] = {"rule": rule, "sub_layers": sub_layers, "epsilon": epsilon}
    labels["block_epsilon"] = epsilon * epsilon_scale(model)
    return Point(f"{rule}-{sub_layers}-eps{epsilon:.3g}", overrides, labels)


def measured(_point: Point, folder: Path, clip: float) -> dict[str, Any]:
    """What a run's depth profiles say.

    Returns:
        `first` and `last`: the quantities of `MEASURED` in the first and the last step, None where
        there is none; `over_depth`: of the last step, at the positions `places` (l / L); `losses`
        of all steps.
    """
    from keel_megatron.depth.profile import read_profiles  # needs numpy

    records = [m for m in iterate_metrics(folder / METRICS_FILE) if "loss" in m]
    norms = {m["step"]: m["grad_norm"] for m in records}
    profiles = read_profiles(folder, may_lack=True)
    found: dict[str, Any] = {"losses": [m["loss"] for m in records]}
    for which, profile in zip(("first", "last"), (profiles[:1], profiles[-1:]), strict=True):
        sizes = _sizes(profile[0], norms, clip) if profile else {}
        found[which] = {name: _typical(name, sizes.get(name)) for name in MEASURED}
    last = _sizes(profiles[-1], norms, clip) if profiles else {}
    curves = {name: thinned(values) for name, values in last.items()}
    found["over_depth"] = {name: [size for _place, size in curve] for name, curve in curves.items()}
    found["places"] = [place for place, _size in curves.get("stream_rms", [])]
    return found


def _sizes(profile: Any, norms: Mapping[int, float], clip: float) -> dict[str, list[float]]:
    """Every quantity of every sub-layer in a step; NaN where it has none."""
    found = {name: profile.values[name].filled(math.nan).tolist() for name in MEASURED}
    norm = norms.get(profile.step, math.nan)
    scale = min(1.0, clip / norm) if clip and norm > 0.0 else 1.0
    found["gradient_rms"] = [size * scale for size in found["gradient_rms"]]
    return found


def _typical(name: str, values: Sequence[float] | None) -> float | None:
    """A quantity of the whole model."""
    if not values:
        return None
    if name == "stream_rms":
        return values[-1] if math.isfinite(values[-1]) else None
    blocks = [mean for _place, mean in grouped(values[2:] or values, 2) if mean is not None]
    return statistics.median(blocks) if blocks else None


def table(rows: Sequence[Row]) -> str:
    """The sizes of every rule and depth; p of L^p where there are several; what epsilon changes."""
    own = _first_epsilon(rows)
    lines = []
    for (rule, sub_layers), found in groups(own, "rule", "sub_layers").items():
        sizes = [
            f"{_shown(found, 'first', name)} → {_shown(found, 'last', name)}" for name in MEASURED
        ]
        lines.append([rule, sub_layers, *sizes, spread(found)])
    columns = ["rule", "sub-layers", *MEASURED.values(), "training loss"]
    tables = [markdown(columns, lines)]
    powers = [
        [rule, *("-" if p is None else f"{p:+.2f}" for p in found.values())]
        for rule, found in exponents(own).items()
    ]
    if powers:
        title = "p of L^p in the last step"
        tables.append(f"{title}:\n\n{markdown(['rule', *MEASURED.values()], powers)}")
    if compared := _epsilons(rows):
        tables.append(f"AdamW's epsilon in the blocks:\n\n{compared}")
    return "\n\n".join(tables)


def exponents(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """By rule and quantity p of the least-squares fit size = c L^p over the depths, last step.

    Rules with fewer than two depths are left out; None where a size is missing or not positive.
    """
    found: dict[str, dict[str, float | None]] = {}
    for (rule,), some in groups(rows, "rule").items():
        by_depth = groups(some, "sub_layers")
        if len(by_depth) > 1:
            found[rule] = {name: _slope(by_depth, name) for name in MEASURED}
    return found


def _slope(by_depth: Mapping[tuple[Any, ...], Sequence[Row]], name: str) -> float | None:
    points = [
        (sub_layers, _of(found, "last", name).mean) for (sub_layers,), found in by_depth.items()
    ]
    if not all(size > 0.0 for _sub_layers, size in points):  # NaN is none either
        return None
    logs = [(math.log(sub_layers), math.log(size)) for sub_layers, size in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


class _AtEpsilon(NamedTuple):
    """A rule and depth with one of several epsilons, against the smallest of them."""

    rule: str
    sub_layers: int
    epsilon: float
    above: float
    """RMS of the gradient / epsilon."""
    share: float
    """Size of the update / that with the smallest epsilon; NaN if that is zero."""
    loss: str
    """Difference of the training loss."""


def _compared(rows: Sequence[Row]) -> list[_AtEpsilon]:
    """Every rule and depth that has several epsilons."""
    found = []
    for (rule, sub_layers), some in groups(rows, "rule", "sub_layers").items():
        by_epsilon = dict(sorted(groups(some, "block_epsilon").items()))
        smallest = next(iter(by_epsilon.values()))
        base = _of(smallest, "last", "update_to_weight").mean
        for (epsilon,), of in by_epsilon.items():
            if len(by_epsilon) == 1:
                continue
            above = _of(of, "last", "gradient_rms").mean / epsilon
            share = _of(of, "last", "update_to_weight").mean / base if base else math.nan
            loss = "-" if of is smallest else paired_difference(of, smallest)
            found.append(_AtEpsilon(rule, sub_layers, epsilon, above, share, loss))
    return found


def _epsilons(rows: Sequence[Row]) -> str:
    """The table of `_compared`; empty where there is one epsilon."""
    lines = [
        [
            one.rule,
            one.sub_layers,
            f"{one.epsilon:.1e}",
            f"{one.above:.3g}",
            "-" if math.isnan(one.share) else f"{one.share:.4f}",
            one.loss,
        ]
        for one in _compared(rows)
    ]
    columns = ["rule", "sub-layers", "epsilon", "gradient RMS / epsilon"]
    columns += ["update / that with the smallest epsilon", "training loss against it"]
    return markdown(columns, lines) if lines else ""


def _first_epsilon(rows: Sequence[Row]) -> list[Row]:
    """Of every rule and depth the rows of one epsilon, the first of the grid."""
    by_point = groups(rows, "rule", "sub_layers").values()
    return [row for some in by_point for row in some if row["epsilon"] == some[0]["epsilon"]]


def _of(rows: Sequence[Row], which: str, name: str) -> Spread:
    """A quantity of the first or the last step over the seeds."""
    return spread([{name: row[which][name]} for row in rows], name)


def _shown(rows: Sequence[Row], which: str, name: str) -> str:
    found = _of(rows, which, name)
    return f"{found.mean:.2g}" if found.n else "-"


def picture(rows: Sequence[Row], out: Path) -> None:
    """The sizes over L and over depth; with several epsilons instead what those change."""
    if compared := _compared(rows):
        _draw_epsilons(compared, pictures.seeds_note(rows), out)
    else:
        _draw_sizes(rows, out)


def _draw_epsilons(compared: Sequence[_AtEpsilon], note: str, out: Path) -> None:
    """Size of the updates over epsilon, and over the gradients relative to it."""
    title = "What AdamW's epsilon changes: size of the updates, last step"
    figure, panels = pictures.new_figure(title, 2, note)
    depths = sorted({one.sub_layers for one in compared})
    for (rule, sub_layers), group in itertools.groupby(compared, lambda one: one[:2]):
        lines = list(group)
        style: dict[str, Any] = {
            "label": f"{rule}, L = {sub_layers}",
            "color": pictures.rule_colour(rule),
            "marker": pictures.MARKERS[depths.index(sub_layers) % len(pictures.MARKERS)],
            "linewidth": 2.0,
        }
        shares = [one.share for one in lines]
        panels[0].plot([one.epsilon for one in lines], shares, **style)
        panels[1].plot([one.above for one in lines], shares, **style)
    panels[0].set_xlabel("epsilon of the blocks")
    panels[0].set_ylabel("update / that with the smallest epsilon")
    panels[1].set_xlabel("RMS of the gradient / epsilon")
    for axes in panels:
        axes.set_xscale("log")
        axes.set_ylim(0.0, 1.05)
    pictures.finish(figure, out)


def _draw_sizes(rows: Sequence[Row], out: Path) -> None:
    """Last step: above every quantity over L, below over the depth of the deepest models."""
    own = _first_epsilon(rows)
    note = f"step {max(row['steps'] for row in own)}, {pictures.seeds_note(own)}"
    title = "Sizes over the number of sub-layers, and over depth"
    figure, panels = pictures.new_figure(title, len(MEASURED), note, rows=2, side=3.1)
    deepest = max(row["sub_layers"] for row in own)
    for number, (name, label) in enumerate(MEASURED.items()):
        over_depths, over_depth = panels[number], panels[len(MEASURED) + number]
        for (rule,), some in groups(own, "rule").items():
            _draw_depths(over_depths, some, name, rule)
            at = [row for row in some if row["sub_layers"] == deepest]
            _draw_depth(over_depth, at, name, rule)
        over_depths.set_xscale("log", base=2)
        over_depths.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        over_depths.set_xlabel("sub-layers L")
        over_depth.set_xlabel(f"l / L at L = {deepest}")
        for axes in (over_depths, over_depth):
            axes.set_title(label, loc="left")
            axes.set_yscale("log")
    pictures.shared_legend(figure, columns=6)
    pictures.finish(figure, out, legend=False)


def _draw_depths(axes: Any, rows: Sequence[Row], name: str, rule: str) -> None:
    by_depth = dict(sorted(groups(rows, "sub_layers").items()))
    x = [sub_layers for (sub_layers,) in by_depth]
    sizes = [_of(found, "last", name) for found in by_depth.values()]
    marker = pictures.MARKERS[list(RULES).index(rule) % len(pictures.MARKERS)]
    pictures.curve(axes, x, sizes, rule, pictures.rule_colour(rule), marker)


def _draw_depth(axes: Any, rows: Sequence[Row], name: str, rule: str) -> None:
    """The mean over seeds at each place."""
    curves = [row["over_depth"].get(name) for row in rows if row["places"]]
    if not curves:
        return
    colour = pictures.rule_colour(rule)
    axes.plot(rows[0]["places"], mean_curve(curves), color=colour, linewidth=2.0)
