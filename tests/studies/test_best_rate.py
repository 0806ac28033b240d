"""Studies that judge each design at its own best rate: depth-scaling and deep-versus-wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.errors import UserError
from keel_megatron.studies import deep_versus_wide, depth_scaling
from keel_megatron.studies.best_rate import best_rates
from keel_megatron.studies.deep_versus_wide import block_parameters, shape_of
from keel_megatron.studies.grid import Axes, Row
from tests.settings import small_config


def rows(rule: str, losses: dict[float, list[float | None]], **labels: Any) -> list[Row]:
    """Runs of one design: its losses by rate, one a seed; None has diverged."""
    return [
        {
            "rule": rule,
            "sub_layers": 64,
            "rate": rate,
            "seed": seed,
            "loss": loss,
            "validation_loss": loss,
            "diverged": loss is None,
            **labels,
        }
        for rate, found in losses.items()
        for seed, loss in enumerate(found)
    ]


KEEL = rows("keel", {1e-3: [5.0, 5.1], 3e-3: [4.0, 4.1], 1e-2: [3.0, None]})
PRE_LN = rows("pre_ln", {1e-3: [4.6, 4.7], 3e-3: [4.8, 4.9]})


def test_the_best_rate_is_one_at_which_no_seed_diverged() -> None:
    best = best_rates([*KEEL, *PRE_LN], "rule")
    keel, pre_ln = best[("keel",)], best[("pre_ln",)]
    assert keel is not None
    assert pre_ln is not None
    assert (keel.rate, keel.shown, keel.loss("loss").mean) == (3e-3, "0.003", pytest.approx(4.05))
    assert pre_ln.shown == "< 0.001"
    assert best_rates(rows("keel", {1e-3: [None]}), "rule") == {("keel",): None}


def test_depth_scaling_compares_with_pre_ln(tmp_path: Path) -> None:
    lost = rows("post_ln", {1e-3: [None]})
    tasks = [row | {"evaluation/toy/acc": 0.5 + 0.1 * row["seed"]} for row in KEEL]
    text = depth_scaling.table([*tasks, *PRE_LN, *lost])
    (line,) = (line for line in text.splitlines() if "keel" in line)
    assert "0.003 | 4.050 ± 0.071 | -0.600 | 0.550 ± 0.071" in line
    assert "diverged at every rate" in text
    assert "toy/acc" in text
    depth_scaling.picture([*KEEL, *PRE_LN, *lost], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_rule_may_have_a_rate_of_its_own() -> None:
    found = depth_scaling.study(Axes((), (8, 16)), (1e-3, 3e-3), {"keel": 5e-3})
    assert [(p.labels["rule"], p.labels["rate"]) for p in found.points[:3]] == [
        ("keel", 5e-3),
        ("pre_ln", 1e-3),
        ("pre_ln", 3e-3),
    ]
    with pytest.raises(UserError, match="--rates: -1 must"):
        depth_scaling.study(Axes((), (8,)), (-1.0,))


def test_shapes_have_the_parameters_of_the_base() -> None:
    base = small_config(
        model__blocks=8,
        model__hidden_size=128,
        model__ffn_hidden_size=384,
        model__num_attention_heads=8,
        model__num_query_groups=4,
    ).model
    wanted = block_parameters(base)
    widths = []
    for sub_layers in (4, 16, 64, 256):
        shape = shape_of(base, sub_layers)
        widths.append(shape.hidden_size)
        assert abs(shape.parameters / wanted - 1) <= 0.01
        assert shape.hidden_size == shape.num_attention_heads * 16
        assert shape.num_attention_heads == 2 * shape.num_query_groups
        sizes = {key.removeprefix("model."): value for key, value in shape.overrides.items()}
        assert block_parameters(base.model_copy(update=sizes)) == shape.parameters
    assert widths == sorted(widths, reverse=True)
    own = shape_of(base, 16)
    assert (own.hidden_size, own.ffn_hidden_size, own.parameters) == (128, 384, wanted)
    with pytest.raises(UserError, match="--depths: no model of 65536"):
        shape_of(base, 65536)


def test_deep_versus_wide_marks_each_rules_optimum(tmp_path: Path) -> None:
    def at(sub_layers: int, loss: float) -> list[Row]:
        labels = {"hidden_size": 4096 // sub_layers, "ffn_hidden_size": 64}
        labels |= {"sub_layers": sub_layers, "block_parameters": 10**6}
        return rows("keel", {1e-3: [loss, loss + 0.01], 3e-3: [9.0, 9.0]}, **labels)

    found = [*at(16, 4.0), *at(64, 3.0), *at(256, 3.5)]
    text = deep_versus_wide.table(found)
    (line,) = (line for line in text.splitlines() if "optimum" in line and "64 x 64" in line)
    assert "3.005" in line
    assert "+0.500" in text
    deep_versus_wide.picture(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    study = deep_versus_wide.study(small_config(), Axes(("keel",), (8, 16)), (1e-3,))
    assert len(study.points) == 2
