"""The skip path's Jacobian products at initialization follow the paper's analysis."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from keel_megatron.studies.flow_report import save_flows
from keel_megatron.studies.gradient_flow import FIRST, GradientFlow, gradient_flow
from tests.distributed import run_ranks

DEPTHS = [64, 256, 1024]
RULES = ["keel", "post_ln", "deepnorm"]
# exp(-sum ln sqrt(1 + 1/alpha^2)) over l = 2 .. L-1, worked out from section 3's J_l on paper:
# Post-LN 2^-(L-2)/2; DeepNorm (1 + L^-1/2)^-(L-2)/2; Keel (1 + L^-2)^-(L-2)/2.
ON_PAPER = {
    "post_ln": lambda L: 2.0 ** (-(L - 2) / 2),
    "deepnorm": lambda L: (1 + L**-0.5) ** (-(L - 2) / 2),
    "keel": lambda L: (1 + L**-2.0) ** (-(L - 2) / 2),
}


def flows() -> list[GradientFlow]:
    return [gradient_flow(rule, depth) for depth in DEPTHS for rule in RULES]


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], GradientFlow]:
    return {(flow.residual, flow.sub_layers): flow for flow in run_ranks(1, flows)[0]}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rule", RULES)
def test_the_skip_path_keeps_what_the_analysis_says(
    measured: dict[tuple[str, int], GradientFlow], rule: str, depth: int
) -> None:
    """What it leaves out is of order 1/h (h = 128): some per cent of the logarithm, and the spread
    of single tokens on top, which grows with the depth that was passed."""
    flow = measured[rule, depth]
    assert flow.predicted[0] == pytest.approx(ON_PAPER[rule](depth), rel=1e-9)
    assert len(flow.skip) == len(flow.predicted) == depth - FIRST + 1
    assert flow.skip[-1] == flow.predicted[-1] == 1.0
    # Over the whole stack, to a tenth of the logarithm.
    whole = abs(math.log(flow.skip[0]) - math.log(flow.predicted[0]))
    assert whole <= 0.05 + 0.1 * abs(math.log(flow.predicted[0]))
    for found, expected in zip(flow.skip, flow.predicted, strict=True):
        distance = abs(math.log(found) - math.log(expected))
        assert distance <= 0.1 + 0.15 * abs(math.log(expected))


def test_keel_alone_keeps_its_gradient_at_any_depth(
    measured: dict[tuple[str, int], GradientFlow],
) -> None:
    for depth in DEPTHS:
        assert measured["keel", depth].skip[0] > 0.95
        assert measured["post_ln", depth].skip[0] < 1e-9
        assert max(abs(g - 1) for g in measured["keel", depth].loss) < 0.01


def test_the_report_has_every_model(
    measured: dict[tuple[str, int], GradientFlow], tmp_path: Path
) -> None:
    found = list(measured.values())
    table, files = save_flows(found, tmp_path)
    assert len(table.splitlines()) == 2 + len(found)
    assert table in (tmp_path / "table.md").read_text()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [GradientFlow(**row) for row in rows] == found
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert str(tmp_path / "picture.png") in files
