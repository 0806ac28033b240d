"""How alpha, the scale of the skip path, changes the loss at a fixed depth; no public sweep exists.

Keel has alpha = L. The grid has alpha from 1 (Post-LN with an inner norm) over sqrt(L) to 4 L, and
at alpha = L the other version of the first block and the model without its final norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from keel_megatron.architecture.residual import RULES, rules_with
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.studies import pictures
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.results import groups, markdown, paired_difference, spread
from keel_megatron.tracking.style import SLATE

_AT: dict[str, Callable[[int], float]] = {
    "one": lambda _l: 1.0,
    "sqrt": math.sqrt,
    "L/4": lambda l: l / 4,
    "L/2": lambda l: l / 2,
    "L": float,
    "2L": lambda l: 2.0 * l,
    "4L": lambda l: 4.0 * l,
}
SCALES = tuple(_AT)
"""Names of the alphas: 1, the square root of L, and multiples of L."""
_BESIDE = 1.06
"""Variants are drawn beside the sweep's point at alpha = L, at a multiple of this factor."""


def study(config: RunConfig, axes: Axes, scales: Sequence[str] = SCALES) -> Study:
    """The study's grid.

    Args:
        config: the configuration of all runs.
        axes: rules (default: keel) and depths.
        scales: names of alphas, of `SCALES`.

    Raises:
        UserError: a rule has no alpha, or a depth is odd.
    """
    points = []
    for rule in axes.rules or ("keel",):
        if rule in RULES and rule not in rules_with("alpha"):
            with_alpha = ", ".join(rules_with("alpha"))
            raise UserError(f"--rules: {rule} has no alpha; choose among {with_alpha}")
        for sub_layers in axes.depths:
            points += _points(config, rule, sub_layers, scales)
    return Study("alpha", points, table=table, picture=picture)


def _points(config: RunConfig, rule: str, sub_layers: int, scales: Sequence[str]) -> list[Point]:
    """The points of one rule and depth: every alpha, then the variants at alpha = L."""
    base = {"model.residual": rule, **depth(sub_layers)}

    def point(scale: str, variant: str = "", **model: object) -> Point:
        alpha = _AT[scale](sub_layers)
        labels: dict[str, Label] = {"rule": rule, "sub_layers": sub_layers}
        labels |= {"scale": scale, "alpha": alpha, "variant": variant}
        overrides = {**base, "model.alpha": alpha}
        overrides |= {f"model.{key}": value for key, value in model.items()}
        end = f"-{variant.replace(' ', '_')}" if variant else ""
        return Point(f"{rule}-{sub_layers}-alpha{alpha:g}{end}", overrides, labels)

    # At a small depth two names may mean the same alpha.
    found = list({one.name: one for one in map(point, scales)}.values())
    if rule in rules_with("first_block"):
        other = "v1" if config.model.first_block == "v2" else "v2"
        found.append(point("L", f"first block {other}", first_block=other))
    norm = config.model.final_norm
    found.append(point("L", f"{'no ' if norm else ''}final norm", final_norm=not norm))
    return found


def table(rows: Sequence[Row]) -> str:
    """One line per point, with its difference from the one at alpha = L."""
    by_point = groups(rows, "rule", "sub_layers", "alpha", "variant")
    lines = []
    for (rule, sub_layers, alpha, variant), found in by_point.items():
        own = by_point.get((rule, sub_layers, float(sub_layers), ""), [])
        loss = spread(found)
        compared = paired_difference(found, own) if own is not found else ""
        shown = f"{found[0]['scale']} = {alpha:g}"
        validation = spread(found, "validation_loss")
        lines.append([rule, sub_layers, shown, variant or "-", loss, validation, compared])
    columns = ["rule", "sub-layers", "alpha", "variant", "training loss", "validation loss"]
    return markdown([*columns, "training loss against alpha = L"], lines)


def picture(rows: Sequence[Row], out: Path) -> None:
    """Training loss over alpha / L, one line per rule and depth; the variants as single points."""
    figure, (axes,) = pictures.new_figure("Training loss over the scale of the skip path")
    by_line = groups(rows, "rule", "sub_layers")
    for number, ((rule, sub_layers), found) in enumerate(by_line.items()):
        colour = pictures.COLOURS[number % len(pictures.COLOURS)]
        for place, ((variant,), some) in enumerate(groups(found, "variant").items()):
            swept = groups(some, "alpha")
            x = [alpha / sub_layers * _BESIDE**place for (alpha,) in swept]
            label, marker = f"{variant or rule}, L = {sub_layers}", pictures.MARKERS[place]
            losses = [spread(one) for one in swept.values()]
            pictures.curve(axes, x, losses, label, SLATE if place else colour, marker)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda value, _position: str(Fraction(value).limit_denominator())
    )
    axes.set_xlabel("alpha / L")
    axes.set_ylabel("training loss, nats per token")
    pictures.finish(figure, out)
