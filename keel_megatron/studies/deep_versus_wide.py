"""Equal parameters from wide to deep (arXiv 2601.19895, Table 5; DepthBench, arXiv 2609.32534).

Shapes have the blocks' parameters of the base configuration within 1 %. Embeddings and output layer
do not count: at a small width they are most of a model, and a deep model would have to give them
up. All shapes see the same tokens, and each is judged at its own best rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.config.model import ModelConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.studies import pictures
from keel_megatron.studies.best_rate import EDGE, best_rates, check_rates, loss_key
from keel_megatron.studies.depth_scaling import RULES, sweep
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.results import markdown, paired_difference

TOLERANCE = 0.01
_FFN_STEP = 4
"""FFN sizes are multiples of it."""
_SWEEPS = 2
"""Rules whose sweeps are drawn."""


@dataclass(frozen=True)
class Shape:
    """A model of a wanted number of parameters."""

    sub_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    parameters: int
    """Of the blocks, norms included."""

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the model."""
        names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        return depth(self.sub_layers) | {f"model.{name}": getattr(self, name) for name in names}


def study(config: RunConfig, axes: Axes, rates: Sequence[float]) -> Study:
    """The study's grid.

    Args:
        config: the configuration of all runs; its shape gives the parameters, the head size, the
            ratio of heads to query groups, and that of FFN to width.
        axes: rules (default: keel and pre_ln) and depths.
        rates: the sweep of every shape and rule.

    Raises:
        UserError: no width gives the parameters at a depth, or a rate is not positive.
    """
    check_rates(rates)
    shapes = [shape_of(config.model, sub_layers) for sub_layers in axes.depths]

    def point(rule: str, shape: Shape, rate: float) -> Point:
        """One rule, shape and rate."""
        overrides = {"model.residual": rule, **shape.overrides, "optimizer.learning_rate": rate}
        labels: dict[str, Label] = {
            "rule": rule,
            "sub_layers": shape.sub_layers,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "block_parameters": shape.parameters,
            "rate": rate,
        }
        name = f"{rule}-{shape.sub_layers}x{shape.hidden_size}-lr{rate:g}"
        return Point(name, overrides, labels)

    points = [
        point(rule, shape, rate)
        for shape in shapes
        for rule in axes.rules or RULES
        for rate in rates
    ]
    return Study("deep-versus-wide", points, table, picture)


def shape_of(model: ModelConfig, sub_layers: int) -> Shape:
    """The shape of a depth with the base's parameters, its heads' size and its proportions.

    The width is the multiple of the head size whose FFN comes closest to the base's ratio of FFN to
    width; the FFN's size then meets the parameters.

    Args:
        model: the base.
        sub_layers: the depth.

    Raises:
        UserError: there is none within 1 %.
    """
    wanted = block_parameters(model)
    ratio = model.ffn_hidden_size / model.hidden_size
    heads_per_group = model.num_attention_heads // model.query_groups
    blocks = depth(sub_layers)["model.blocks"]
    found: list[tuple[float, Shape]] = []
    for groups in range(1, 4 * model.query_groups * max(1, model.blocks // blocks) + 1):
        heads = groups * heads_per_group
        hidden = heads * model.head_dim
        attention = hidden * model.head_dim * (2 * heads + 2 * groups)
        ffn = (wanted / blocks - attention) / (3 * hidden)
        ffn_size = max(_FFN_STEP, round(ffn / _FFN_STEP) * _FFN_STEP)
        sizes = {
            "blocks": blocks,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn_size,
            "num_attention_heads": heads,
            "num_query_groups": groups,
        }
        parameters = block_parameters(model.model_copy(update=sizes))
        if abs(parameters / wanted - 1.0) <= TOLERANCE:
            shape = Shape(sub_layers, hidden, ffn_size, heads, groups, parameters)
            found.append((abs(ffn_size / hidden / ratio - 1.0), shape))
    if not found:
        raise UserError(
            f"--depths: no model of {sub_layers} sub-layers and heads of size {model.head_dim} has "
            f"the base's {wanted:,} parameters in its blocks within 1 %; choose a depth nearer to "
            f"{model.sub_layers}, or a base with more parameters"
        )
    return min(found, key=lambda one: one[0])[1]


def block_parameters(model: ModelConfig) -> int:
    """Parameters of the blocks with their norms, without embeddings and output layer."""
    return parameter_count(model, 0)


def table(rows: Sequence[Row]) -> str:
    """One line per shape and rule at its best rate; each rule's lowest loss is its optimum."""
    key = loss_key(rows)
    best = best_rates(rows, "rule", "sub_layers")
    lines = []
    for (rule, sub_layers), one in best.items():
        some = [row for row in rows if (row["rule"], row["sub_layers"]) == (rule, sub_layers)]
        shape = f"{sub_layers} x {some[0]['hidden_size']} (FFN {some[0]['ffn_hidden_size']})"
        shared = [rule, shape, f"{some[0]['block_parameters'] / 1e6:.3f} M"]
        if one is None:
            lines.append([*shared, "-", "diverged at every rate", "-"])
            continue
        own = {at: other for (name, at), other in best.items() if name == rule and other}
        lowest = min(own, key=lambda at: own[at].loss(key).mean)
        compared = paired_difference(one.rows, own[lowest].rows, key)
        mark = "optimum" if lowest == sub_layers else compared
        lines.append([*shared, one.shown, one.loss(key), mark])
    columns = ["rule", "sub-layers x width", "parameters of the blocks", "best rate"]
    text = markdown([*columns, key.replace("_", " "), "against the rule's optimum"], lines)
    return f"{text}\n\n{EDGE}"


def picture(rows: Sequence[Row], out: Path) -> None:
    """Loss over depth at equal parameters, one line per rule, its optimum marked.

    Beside it the sweeps, of as many rules as can be told apart there.
    """
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    panels = 2 if len(rules) <= _SWEEPS else 1
    title = "Equal parameters from wide to deep, at the best rate of each"
    figure, axes = pictures.new_figure(title, panels)
    _over_depth(axes[0], rows, rules)
    if panels > 1:
        sweep(axes[1], rows, "sub_layers")
        depths = dict.fromkeys(row["sub_layers"] for row in rows)
        pictures.marker_legend(axes[1], [f"L = {at}" for at in depths])
    pictures.finish(figure, out)


def _over_depth(axes: Any, rows: Sequence[Row], rules: Sequence[str]) -> None:
    """Loss over depth, one line per rule, a star at its optimum."""
    key, best = loss_key(rows), best_rates(rows, "rule", "sub_layers")
    for number, rule in enumerate(rules):
        known = {at: one.loss(key) for (name, at), one in best.items() if name == rule and one}
        if not known:
            continue
        colour = pictures.rule_colour(rule)
        marker = pictures.MARKERS[number % len(pictures.MARKERS)]
        depths = sorted(known)
        pictures.curve(axes, depths, [known[at] for at in depths], rule, colour, marker)
        lowest = min(known, key=lambda at: known[at].mean)
        axes.plot(lowest, known[lowest].mean, marker="*", markersize=18, color=colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.set_xlabel("sub-layers L (narrower to the right)")
    axes.set_ylabel(f"{key.replace('_', ' ')}, nats per token")
