"""What a bf16 residual stream costs, and whether it takes Keel's advantage over Pre-LN away.

Post-norm with a scaled skip path adds about std(F) / alpha of the stream's size to it in every
sub-layer, and bf16 numbers are 2^-8 to 2^-7 of their size apart. So what survives depends on alpha
and on the branch's size, which every run measures (depth/profile.py: `branch_rms`, `update_kept`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from keel_megatron.architecture.residual import RULES
from keel_megatron.config.model import Stream
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.studies import pictures
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.results import (
    NOTHING,
    Spread,
    difference,
    excess,
    groups,
    is_different,
    markdown,
    spread,
)

STREAMS: tuple[str, ...] = get_args(Stream)
ALPHAS = ("32", "64", "128", "auto", "1024")
"""As `model.alpha`; auto is L for Keel."""
_BASELINE = "pre_ln"
_MEASURED = ("branch_rms", "update_size", "update_kept")
"""Of the run's last depth profile, the median over the sub-layers after the first block."""
_PROFILES = 4
"""Depth profiles of a run after its first step."""


def study(
    config: RunConfig,
    axes: Axes,
    streams: Sequence[str] = STREAMS,
    alphas: Sequence[str] = ALPHAS,
) -> Study:
    """The study's grid.

    Args:
        config: the configuration of all runs.
        axes: rules (default: keel and pre_ln) and depths.
        streams: values of `model.stream`; fp32 is always among them, for comparison.
        alphas: values of `model.alpha`, for rules that have it.

    Raises:
        UserError: an alpha is no positive number, or a depth is odd.
    """
    chosen = [stream for stream in STREAMS if stream in ("fp32", *streams)]
    values = [_alpha(alpha) for alpha in alphas]
    profiles = {"tracking.depth_every": max(1, config.training.steps // _PROFILES)}
    points = [
        _point(rule, sub_layers, stream, alpha, profiles)
        for sub_layers in axes.depths
        for rule in axes.rules or ("keel", _BASELINE)
        for alpha in _resolved(rule, sub_layers, values)
        for stream in chosen
    ]
    return Study("stream-precision", points, table=table, picture=picture, row=measured)


def _alpha(text: str) -> float | None:
    """A value of --alphas; None for auto."""
    try:
        value = None if text == "auto" else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not 0.0 < value < math.inf:
        raise UserError(f"--alphas: {text} must be auto or a positive number")
    return value


def _resolved(rule: str, sub_layers: int, alphas: Sequence[float | None]) -> Sequence[float | None]:
    """The alphas of a rule, each once; a rule without alpha has None."""
    found = RULES.get(rule)
    if found is None or "alpha" not in found.settings:
        return [None]
    auto = float(sub_layers) ** found.alpha_exponent
    return list(dict.fromkeys(auto if alpha is None else alpha for alpha in alphas))


def _point(
    rule: str, sub_layers: int, stream: str, alpha: float | None, more: Mapping[str, Any]
) -> Point:
    overrides = {"model.residual": rule, "model.stream": stream, **depth(sub_layers), **more}
    if alpha is not None:
        overrides["model.alpha"] = alpha
    at = "" if alpha is None else f"-alpha{alpha:g}"
    labels: dict[str, Label] = {"rule": rule, "sub_layers": sub_layers}
    labels |= {"alpha": alpha, "stream": stream}
    return Point(f"{rule}-{sub_layers}{at}-{stream}", overrides, labels)


def measured(_point: Point, folder: Path) -> dict[str, float | None]:
    """Medians of a run's last depth profile; None for what it has not."""
    from keel_megatron.depth.profile import finite_values, read_profiles  # needs numpy

    profiles = read_profiles(folder, may_lack=True)
    found: dict[str, float | None] = {}
    for name in _MEASURED:
        values = finite_values(profiles[-1].values[name][2:]) if profiles else ()
        found[name] = statistics.median(map(float, values)) if len(values) else None
    return found


def table(rows: Sequence[Row]) -> str:
    """Losses of every point against its fp32 stream; then the advantage over Pre-LN."""
    by_point = groups(rows, "sub_layers", "rule", "alpha", "stream")
    lines = []
    for (sub_layers, rule, alpha, stream), found in by_point.items():
        wide = excess(found, by_point.get((sub_layers, rule, alpha, "fp32"), []))
        loss = spread(found)
        compared = "" if stream == "fp32" else difference(wide, NOTHING)
        numbers = [_number(spread(found, name)) for name in _MEASURED]
        shown = "-" if alpha is None else f"{alpha:g}"
        validation = spread(found, "validation_loss")
        lines.append([sub_layers, rule, shown, stream, loss, compared, validation, *numbers])
    columns = ["sub-layers", "rule", "alpha", "stream", "training loss", "against fp32"]
    columns += ["validation loss", "RMS of the branch", "branch / skip path", "update kept"]
    parts = [markdown(columns, lines), _advantages(rows)]
    return "\n\n".join(part for part in parts if part)


def _number(one: Spread) -> str:
    return f"{one.mean:.3g}" if one.n else "-"


def _advantages(rows: Sequence[Row]) -> str:
    """Markdown: loss of Pre-LN minus that of every other rule, with the same stream and seed."""
    by_point = groups(rows, "sub_layers", "rule", "alpha", "stream")
    lines = []
    for (sub_layers, rule, alpha, stream), found in by_point.items():
        baseline = by_point.get((sub_layers, _BASELINE, None, stream), [])
        if rule == _BASELINE or not baseline:
            continue
        own = excess(baseline, found)
        wide = excess(
            by_point.get((sub_layers, _BASELINE, None, "fp32"), []),
            by_point.get((sub_layers, rule, alpha, "fp32"), []),
        )
        changed = "" if stream == "fp32" else difference(own, wide)
        better = difference(own, NOTHING)
        verdict = "" if stream == "fp32" else answer(own, wide)
        shown = "-" if alpha is None else f"{alpha:g}"
        lines.append([sub_layers, rule, shown, stream, better, changed, verdict])
    if not lines:
        return ""
    columns = ["sub-layers", "rule", "alpha", "stream", "advantage over pre_ln"]
    columns += ["against the advantage with fp32", "with this stream the advantage"]
    return markdown(columns, lines)


def answer(own: Spread, wide: Spread) -> str:
    """What becomes of an advantage: it remains, shrinks, grows, vanishes or is reversed.

    Args:
        own: with the stream in question, of seeds in pairs.
        wide: with an fp32 stream.

    Returns:
        `unknown` with fewer than two seeds; `was none` if the advantage with fp32 is not greater
        than 0 by more than its spread. It vanishes if it is not different from 0 with this stream,
        and shrinks or grows if it is different from 0 and from the one with fp32.
    """
    there, here = is_different(wide, NOTHING), is_different(own, NOTHING)
    changed = is_different(own, wide)
    if there is None or here is None or changed is None:
        return "unknown"
    if not there or wide.mean <= 0.0:
        return "was none"
    if not here:
        return "vanishes"
    if own.mean < 0.0:
        return "is reversed"
    if not changed:
        return "remains"
    return "shrinks" if own.mean < wide.mean else "grows"


def picture(rows: Sequence[Row], out: Path) -> None:
    """Loss over alpha, a line per stream and a level for each rule without alpha; what is kept."""
    depths = list(groups(rows, "sub_layers"))
    note = pictures.seeds_note(rows)
    title = "Training loss with a residual stream in bf16"
    figure, panels = pictures.new_figure(title, len(depths) + 1, note)
    for axes, (sub_layers,) in zip(panels, depths, strict=False):
        some = [row for row in rows if row["sub_layers"] == sub_layers]
        _draw_losses(axes, some)
        axes.set_title(f"{sub_layers} sub-layers", loc="left")
    kept = [row for row in rows if row["sub_layers"] == depths[-1][0]]
    _draw_kept(panels[-1], kept)
    panels[-1].set_title("Part of an update that is stored", loc="left")
    pictures.shared_legend(figure)
    pictures.finish(figure, out, legend=False)


def _draw_losses(axes: Any, rows: Sequence[Row]) -> None:
    for number, ((stream,), found) in enumerate(_by_stream(rows)):
        colour = pictures.COLOURS[number]
        for (rule,), some in groups(found, "rule").items():
            label = f"{rule}, {stream}"
            if some[0]["alpha"] is None:
                one = spread(some)
                if one.n:
                    axes.axhline(one.mean, color=colour, linestyle=(0, (4, 3)), label=label)
            else:
                _over_alpha(axes, some, label, number, "loss")
    axes.set_ylabel("training loss, nats per token")


def _draw_kept(axes: Any, rows: Sequence[Row]) -> None:
    for number, ((stream,), found) in enumerate(_by_stream(rows)):
        for (rule,), some in groups(found, "rule").items():
            if some[0]["alpha"] is not None and stream != "fp32":
                _over_alpha(axes, some, f"{rule}, {stream}", number, "update_kept")
    axes.set_ylim(0.0, 1.05)
    axes.set_ylabel("cosine of the stored and the exact update")


def _by_stream(rows: Sequence[Row]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by stream, in the order of `STREAMS`, so that a stream has one colour."""
    found = groups(rows, "stream")
    return [((stream,), found.get((stream,), [])) for stream in STREAMS]


def _over_alpha(axes: Any, rows: Sequence[Row], label: str, number: int, key: str) -> None:
    by_alpha = dict(sorted(groups(rows, "alpha").items()))
    x = [alpha for (alpha,) in by_alpha]
    values = [spread(found, key) for found in by_alpha.values()]
    # Lines that lie on each other stay legible: a little beside each other.
    x = [alpha * 1.03 ** (number - 1.5) for alpha in x]
    pictures.curve(axes, x, values, label, pictures.COLOURS[number], pictures.MARKERS[number])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.set_xlabel("alpha")
