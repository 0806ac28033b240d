"""Rows, spread over seeds and what counts as a difference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from keel_megatron.studies.results import (
    Spread,
    difference,
    excess,
    groups,
    is_different,
    markdown,
    paired_difference,
    spread,
    write_results,
    write_table,
)


def losses(*values: float | None) -> list[dict[str, object]]:
    return [{"loss": value, "diverged": value is None} for value in values]


def test_spread_is_over_the_runs_that_have_a_loss() -> None:
    found = spread(losses(1.0, 2.0, None, 3.0))
    assert (found.mean, found.deviation, found.n, found.diverged) == (2.0, 1.0, 3, 1)
    assert str(found) == "2.000 ± 1.000 (1 of 4 diverged)"
    assert str(spread(losses(1.5))) == "1.500"
    assert str(spread(losses(None, None))) == "2 of 2 diverged"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # scipy 1.17's ttest_ind(equal_var=False): t = 2.449, df = 4, quantile 2.776.
        ([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], False),
        # t = 3.674, df = 4.
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], True),
        # t = 1.984, df = 2.03, quantile 4.243.
        ([1.0, 2.0, 3.0], [3.1, 3.2], False),
        ([1.0, 1.0], [2.0, 2.0], True),
        ([1.0, 1.0], [1.0, 1.0], False),
        ([1.0], [9.0, 9.1], None),
        ([], [9.0, 9.1], None),
    ],
)
def test_a_difference_within_the_spread_is_none(
    a: list[float], b: list[float], expected: bool | None
) -> None:
    one, other = spread(losses(*a)), spread(losses(*b))
    assert is_different(one, other) is expected
    assert is_different(other, one) is expected


def test_many_seeds_show_a_small_difference() -> None:
    a, b = Spread(1.0, 0.1, 100), Spread(1.03, 0.1, 100)
    assert is_different(a, b) is True
    assert is_different(Spread(1.0, 0.1, 30), Spread(1.03, 0.1, 30)) is False


def test_a_difference_in_a_table() -> None:
    a, near, far = (Spread(mean, 0.1, 3) for mean in (2.0, 2.1, 3.0))
    assert difference(a, near) == "no difference (-0.100)"
    assert difference(far, a) == "+1.000"
    assert difference(Spread(2.0, math.nan, 1), a) == "+0.000 (no spread: one seed)"
    assert difference(a, spread(losses(None))) == "-"


def test_runs_of_the_same_seed_are_compared_in_pairs() -> None:
    """A shift that is smaller than the spread over seeds."""
    rows = [{"seed": n, "loss": 3.0 + n + 0.001 * (n % 2)} for n in range(4)]
    baseline = [{"seed": n, "loss": 2.9 + n} for n in range(1, 6)] + [{"seed": 0, "loss": None}]
    assert is_different(spread(rows), spread(baseline)) is False
    found = excess(rows, baseline)
    assert found.n == 3
    assert found.mean == pytest.approx(0.1 + 0.002 / 3)
    assert paired_difference(rows, baseline) == "+0.101"
    assert paired_difference(rows, [{"seed": n, "loss": 3.0 + n} for n in range(4)]).startswith(
        "no difference"
    )
    assert paired_difference(rows[:1], rows[:1]) == "+0.000 (no spread: one seed)"


def test_groups_keep_the_order() -> None:
    rows = [{"rule": rule, "depth": depth} for rule in ("b", "a") for depth in (2, 1)]
    assert list(groups(rows, "depth")) == [(2,), (1,)]
    assert [len(found) for found in groups(rows, "rule").values()] == [2, 2]


def test_results_are_strict_json_with_their_origin(tmp_path: Path) -> None:
    row = {"loss": math.nan, "more": [math.inf, 1.0]}
    write_results("alpha", tmp_path, [row], ["left"], machine="a computer")
    text = (tmp_path / "results.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["rows"] == [{"loss": None, "more": [None, 1.0]}]
    assert found["missing"] == ["left"]
    assert found["machines"] == {"a computer": 1}
    assert "core" in found["collected_on"]
    assert found["packages"]["torch"]
    assert found["version"]
    assert found["command"]


def test_results_name_the_machines_that_trained(tmp_path: Path) -> None:
    trained = [{"machine": "16 x NVIDIA H200"}] * 2
    write_table(tmp_path, "| a |", trained)
    heading = (tmp_path / "table.md").read_text().splitlines()[2]
    assert heading.startswith("16 x NVIDIA H200; keel-megatron ")
    write_table(tmp_path, "| a |", [*trained, {"machine": "not recorded"}])
    heading = (tmp_path / "table.md").read_text().splitlines()[2]
    assert heading.startswith(
        "machine: 16 x NVIDIA H200 (2 runs); not recorded (1 run); results collected on "
    )


def test_markdown_aligns_numbers_and_keeps_bars() -> None:
    assert markdown(["a|b", "n"], [["x", 1], ["y|z", 2.5]]).splitlines() == [
        "| a\\|b | n |",
        "| --- | --: |",
        "| x | 1 |",
        "| y\\|z | 2.5 |",
    ]
