"""Muon against AdamW: the loss at each one's best rate, and how the weights grow over the depth.

Each rule and depth is trained with each optimizer over a sweep of learning rates. Depth profiles
on the way record the RMS of every sub-layer's matrices. A public trainer reports that the weights
of a Keel model grew by 2 to 3 % per 1000 steps under NorMuon: `growth` is in the same unit.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from keel_megatron.config.optimizer import OptimizerConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import pictures
from keel_megatron.studies.best_rate import EDGE, Best, best_rates, check_rates, loss_key
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.over_depth import mean_curve, thinned
from keel_megatron.studies.results import groups, markdown, paired_difference, spread

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerConfig.model_fields["name"].annotation)
RULES = ("keel", "pre_ln")
_BASELINE = "adamw"
_PROFILES = 8
"""Depth profiles of a run, after that of its first step."""
_STYLES = dict(zip(OPTIMIZERS, (("o", "-"), ("s", "--")), strict=True))
"""Marker and line of each optimizer; the colour is the rule's."""
_TICKS = (0.2, 0.5, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 3, 4, 5, 7, 10, 20, 50)


def study(
    config: RunConfig,
    axes: Axes,
    rates: Sequence[float],
    optimizers: Sequence[str] = OPTIMIZERS,
) -> Study:
    """The study's grid.

    Args:
        config: the configuration of all runs.
        axes: rules (default: keel and pre_ln) and depths.
        rates: the sweep of every rule, depth and optimizer.
        optimizers: of `OPTIMIZERS`.

    Raises:
        UserError: a rate is not positive, or a depth is odd.
    """
    check_rates(rates)
    profiles = {"tracking.depth_every": max(1, config.training.steps // _PROFILES)}

    def point(rule: str, sub_layers: int, optimizer: str, rate: float) -> Point:
        """One rule, depth, optimizer and rate."""
        overrides = {"model.residual": rule, **depth(sub_layers), **profiles}
        overrides |= {"optimizer.name": optimizer, "optimizer.learning_rate": rate}
        labels: dict[str, Label] = {"rule": rule, "sub_layers": sub_layers}
        labels |= {"optimizer": optimizer, "rate": rate}
        return Point(f"{rule}-{sub_layers}-{optimizer}-lr{rate:g}", overrides, labels)

    points = [
        point(rule, sub_layers, optimizer, rate)
        for sub_layers in axes.depths
        for rule in axes.rules or RULES
        for optimizer in optimizers
        for rate in rates
    ]
    return Study("optimizers", points, table, picture, lambda _point, folder: measured(folder))


def measured(folder: Path) -> dict[str, Any]:
    """How a run's weights grew, from its depth profiles.

    Returns:
        `profile_steps`; `weights`: the median over the sub-layers of the RMS of their matrices,
        before the update of each of these steps; `growth` and `late_growth` of it over the whole
        run and over its second half; `over_depth`: last RMS / first at the positions `places`
        (l / L). Growths are None where there are fewer than two profiles.
    """
    from keel_megatron.depth.profile import read_profiles  # needs numpy

    profiles = read_profiles(folder, may_lack=True)
    steps = [profile.step for profile in profiles]
    sizes = [profile.values["weight_rms"].tolist() for profile in profiles]
    weights = [statistics.median(found) for found in sizes]
    half = min(range(len(steps)), key=lambda n: abs(steps[n] - steps[-1] / 2), default=0)
    ends = zip(sizes[0], sizes[-1], strict=True) if sizes else ()
    curve = thinned([last / first for first, last in ends])
    return {
        "profile_steps": steps,
        "weights": weights,
        "growth": growth(steps, weights),
        "late_growth": growth(steps[half:], weights[half:]),
        "places": [place for place, _ratio in curve],
        "over_depth": [ratio for _place, ratio in curve],
    }


def growth(steps: Sequence[int], weights: Sequence[float]) -> float | None:
    """Growth in percent per 1000 steps, from the first to the last of some sizes of weights."""
    if len(steps) < 2:
        return None
    return 100.0 * (weights[-1] / weights[0] - 1.0) * 1000.0 / (steps[-1] - steps[0])


def table(rows: Sequence[Row]) -> str:
    """One line per depth, rule and optimizer at its best rate, with the growth of its weights."""
    best = best_rates(rows, "sub_layers", "rule", "optimizer")
    key = loss_key(rows)
    lines = []
    for (sub_layers, rule, optimizer), one in best.items():
        cell = [sub_layers, rule, optimizer]
        if one is None:
            lines.append([*cell, "-", "diverged at every rate", *("-" * 5)])
            continue
        base = best.get((sub_layers, rule, _BASELINE))
        compared = paired_difference(one.rows, base.rows, key) if base and one is not base else ""
        lines.append([*cell, one.shown, one.loss(key), compared, *_growths(one)])
    columns = ["sub-layers", "rule", "optimizer", "best rate", key.replace("_", " ")]
    columns += [f"against {_BASELINE}", "weights, last / first", "over the depth"]
    columns += ["growth per 1000 steps", "in the second half"]
    return "\n\n".join([markdown(columns, lines), EDGE, _factors(rows)])


def _factors(rows: Sequence[Row]) -> str:
    """The factor of the weights at every rate, not only at the best."""
    rates = sorted({row["rate"] for row in rows})
    lines = []
    for cell, found in groups(rows, "sub_layers", "rule", "optimizer").items():
        by_rate = groups(found, "rate")
        known = [_known(by_rate.get((rate,), [])) for rate in rates]
        lines.append([*cell, *(f"{_factor(some):.2f}" if some else "-" for some in known)])
    columns = ["sub-layers", "rule", "optimizer", *(f"rate {rate:g}" for rate in rates)]
    return f"Weights, last / first, at each rate:\n\n{markdown(columns, lines)}"


def _known(rows: Sequence[Row]) -> list[Row]:
    """The runs that have depth profiles at two steps at least."""
    return [row for row in rows if len(row["weights"]) > 1]


def _factor(rows: Sequence[Row]) -> float:
    """The last size of the weights over the first, mean over runs."""
    return statistics.fmean(row["weights"][-1] / row["weights"][0] for row in rows)


def _growths(one: Best) -> list[str]:
    """Of a design at its best rate: factor of its weights, its range over depth, growth."""
    known = _known(one.rows)
    if not known:
        return ["-"] * 4
    ratios = mean_curve([row["over_depth"] for row in known])
    growths = [spread(known, name) for name in ("growth", "late_growth")]
    shown = [
        f"{found.mean:+.1f} %" if found.n < 2 else f"{found.mean:+.1f} ± {found.deviation:.1f} %"
        for found in growths
    ]
    return [f"{_factor(known):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}", *shown]


def picture(rows: Sequence[Row], out: Path) -> None:
    """For each depth the loss over the rate, and at the best rates the weights' growth.

    Growth is the last RMS of the matrices over the first, over the steps (median over the depth)
    and over the depth.
    """
    by_depth = groups(rows, "sub_layers")
    note = pictures.seeds_note(rows)
    title = "Muon and AdamW: loss, and growth of the weights at the best rate"
    figure, panels = pictures.new_figure(title, 3, note, rows=len(by_depth))
    best = best_rates(rows, "sub_layers", "rule", "optimizer")
    for number, (sub_layers,) in enumerate(by_depth):
        loss, over_steps, over_depth = panels[3 * number : 3 * number + 3]
        for (at, rule, optimizer), one in best.items():
            if at == sub_layers:
                some = by_depth[sub_layers,]
                cell = [r for r in some if (r["rule"], r["optimizer"]) == (rule, optimizer)]
                _draw_losses(loss, cell, loss_key(rows))
                if one is not None:
                    _draw_growth(over_steps, over_depth, one)
        loss.set_title(f"{sub_layers} sub-layers: loss", loc="left")
        pictures.rate_axis(loss, {row["rate"] for row in rows})
        loss.set_ylabel(f"{loss_key(rows).replace('_', ' ')}, nats per token")
        over_steps.set_title("Weights / initial weights, median over depth", loc="left")
        over_steps.set_xlabel("step")
        over_depth.set_title("The same at the last step, over depth", loc="left")
        over_depth.set_xlabel("l / L")
        for axes in (over_steps, over_depth):
            _factor_axis(axes)
    pictures.shared_legend(figure)
    pictures.finish(figure, out, legend=False)


def _factor_axis(axes: Any) -> None:
    """Make the y axis one of factors: logarithmic, with ticks at round numbers."""
    low, high = axes.get_ylim()
    axes.set_yscale("log")
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _draw_losses(axes: Any, rows: Sequence[Row], key: str) -> None:
    """The sweep of one rule and optimizer."""
    by_rate = dict(sorted(groups(rows, "rate").items()))
    losses = [spread(found, key) for found in by_rate.values()]
    rule, optimizer = rows[0]["rule"], rows[0]["optimizer"]
    colour = pictures.rule_colour(rule)
    rates = [rate for (rate,) in by_rate]
    pictures.curve(axes, rates, losses, f"{rule}, {optimizer}", colour, *_STYLES[optimizer])


def _draw_growth(over_steps: Any, over_depth: Any, one: Best) -> None:
    """The weights of one rule and optimizer at its best rate."""
    known = _known(one.rows)
    if not known:
        return
    colour = pictures.rule_colour(known[0]["rule"])
    _marker, style = _STYLES[known[0]["optimizer"]]
    factors = mean_curve([[w / row["weights"][0] for w in row["weights"]] for row in known])
    options = {"color": colour, "linestyle": style, "linewidth": 2.2}
    over_steps.plot(known[0]["profile_steps"], factors, **options)
    ratios = mean_curve([row["over_depth"] for row in known])
    over_depth.plot(known[0]["places"], ratios, **options)
