"""The largest learning rate that each rule bears (arXiv 2601.19895, Table 1).

The rate rises linearly from 0 to a ceiling over the whole run, which it reaches at the last step
but one. The maximum is the rate at the step before the run diverges (divergence.py). The rate rises
by ceiling / steps per step, which bounds the resolution; a lower ceiling resolves lower rates, and
trains longer at each.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel_megatron.architecture.residual import RULES
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.studies import pictures
from keel_megatron.studies.divergence import Curve, Divergence, divergence, reference, smooth
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.results import groups, markdown
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.run_log import METRICS_FILE

PAPER_RULES = ("post_ln", "deepnorm", "hybrid_norm", "mix_ln", "pre_ln", "keel")
CEILING = 5e-2
"""The paper's."""
PAPER: Mapping[tuple[str, int], float] = {
    ("post_ln", 64): 3.0e-4,
    ("deepnorm", 64): 3.5e-4,
    ("hybrid_norm", 64): 4.9e-4,
    ("mix_ln", 64): 8.6e-4,
    ("pre_ln", 64): 7.65e-3,
    ("keel", 64): 1.01e-2,
    ("post_ln", 512): 2.8e-4,
    ("deepnorm", 512): 3.5e-4,
    ("hybrid_norm", 512): 3.5e-4,
    ("mix_ln", 512): 3.5e-4,
    ("pre_ln", 512): 4.67e-3,
    ("keel", 512): 6.31e-3,
}
"""Table 1 by rule and sub-layers: width 1024, a ramp of 5000 steps."""


def study(config: RunConfig, axes: Axes, ceilings: Sequence[float] = (CEILING,)) -> Study:
    """The study's grid.

    Args:
        config: the configuration of all runs; its steps are the ramp's.
        axes: rules (default: the paper's six) and depths.
        ceilings: rates at the last step.

    Raises:
        UserError: a ceiling is not positive, or a depth is odd.
    """
    for ceiling in ceilings:
        if not ceiling > 0.0:
            raise UserError(f"--ceiling: {ceiling:g} must be above 0")
    steps = config.training.steps

    def point(rule: str, sub_layers: int, ceiling: float) -> Point:
        """One rule, depth and ceiling."""
        overrides = {
            "model.residual": rule,
            **depth(sub_layers),
            "optimizer.learning_rate": ceiling,
            "schedule.warmup_steps": steps - 1,
            "schedule.decay": "constant",
            "guard.action": "off",
        }
        labels: dict[str, Label] = {
            "rule": rule,
            "sub_layers": sub_layers,
            "ceiling": ceiling,
        }
        return Point(f"{rule}-{sub_layers}-to{ceiling:g}", overrides, labels)

    points = [
        point(rule, sub_layers, ceiling)
        for sub_layers in axes.depths
        for ceiling in ceilings
        for rule in axes.rules or PAPER_RULES
    ]
    return Study(
        "max-learning-rate",
        points,
        table=table,
        picture=picture,
        row=lambda _p, folder: row(folder, steps),
    )


def row(folder: Path, steps: int) -> dict[str, Any]:
    """The smoothed curve of a run.

    Args:
        folder: the run's.
        steps: of its configuration.
    """
    losses = [m["loss"] for m in iterate_metrics(folder / METRICS_FILE) if "loss" in m]
    curve = smooth(losses, steps)
    return {
        "ramp_steps": steps - 1,
        "curve_steps": list(curve.steps),
        "curve_losses": [round(loss, 5) for loss in curve.losses],
        "lost": curve.lost,
    }


def curve_of(row: Row) -> Curve:
    """The curve in a row."""
    return Curve(tuple(row["curve_steps"]), tuple(row["curve_losses"]), row["lost"])


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[Row, Divergence | None]]:
    """Each row, and when its run diverged.

    Runs of one depth, ceiling and seed saw the same batches at the same rates: the reference.
    """
    for found in groups(rows, "sub_layers", "ceiling", "seed").values():
        drops = reference([curve_of(row) for row in found])
        for row in found:
            yield row, divergence(curve_of(row), drops)


def max_rate(row: Row, verdict: Divergence | None) -> float:
    """The rate at the step before the divergence; the ceiling if there is none."""
    ramp = int(row["ramp_steps"])
    step = ramp if verdict is None else min(ramp, verdict.step - 1)
    return float(row["ceiling"]) * step / ramp


def table(rows: Sequence[Row]) -> str:
    """One line per rule, depth and ceiling: the maximum rate of each seed, the signs, the paper."""
    judged = {row["run"]: verdict for row, verdict in verdicts(rows)}
    lines = []
    for (sub_layers, ceiling, rule), found in groups(rows, "sub_layers", "ceiling", "rule").items():
        rates = [max_rate(row, judged[row["run"]]) for row in found]
        signs = [one.sign if (one := judged[row["run"]]) else "none" for row in found]
        lowest = [min(row["curve_losses"], default=None) for row in found]
        known = [loss for loss in lowest if loss is not None]
        paper = PAPER.get((rule, sub_layers))
        lines.append(
            [
                sub_layers,
                f"{ceiling:g}",
                rule,
                rate_text(statistics.fmean(rates)),
                ", ".join(map(rate_text, sorted(rates))) if len(rates) > 1 else "-",
                ", ".join(dict.fromkeys(signs)),
                f"{statistics.fmean(known):.3f}" if known else "-",
                rate_text(paper) if paper else "-",
            ]
        )
    columns = ["sub-layers", "ceiling", "rule", "maximum rate", "each seed", "sign"]
    return markdown([*columns, "lowest loss", "paper (width 1024)"], lines)


def rate_text(rate: float) -> str:
    """A learning rate with three digits, `7.65e-3`."""
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def picture(rows: Sequence[Row], out: Path) -> None:
    """Smoothed loss over the learning rate, one panel per depth; a mark where each run diverged.

    Of several ceilings the highest is drawn, and the first seed of each rule.
    """
    by_depth = groups(rows, "sub_layers")
    figure, panels = pictures.new_figure(
        "Loss while the learning rate rises; a cross marks divergence", len(by_depth)
    )
    judged = {row["run"]: verdict for row, verdict in verdicts(rows)}
    for axes, ((sub_layers,), found) in zip(panels, by_depth.items(), strict=True):
        top = max(row["ceiling"] for row in found)
        for (rule,), some in groups(found, "rule").items():
            row = next((one for one in some if one["ceiling"] == top), None)
            if row is not None:
                _draw(axes, row, judged[row["run"]], pictures.rule_colour(rule))
        axes.set_title(f"{sub_layers} sub-layers", loc="left", fontsize=12)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
    panels[0].set_ylabel("training loss, nats per token")
    pictures.finish(figure, out)


def _draw(axes: Any, row: Row, verdict: Divergence | None, colour: str) -> None:
    """One run's curve and its divergence."""
    curve = curve_of(row)
    per_step = row["ceiling"] / row["ramp_steps"]
    axes.plot(
        [step * per_step for step in curve.steps],
        curve.losses,
        color=colour,
        linewidth=2.0,
        label=row["rule"] if row["rule"] in RULES else None,
    )
    if verdict is not None and curve.steps:
        at = min(range(len(curve.steps)), key=lambda n: abs(curve.steps[n] - verdict.step))
        place = (curve.steps[at] * per_step, curve.losses[at])
        axes.plot(
            *place, marker="X", color=colour, markersize=11, markeredgecolor="white", zorder=5
        )
