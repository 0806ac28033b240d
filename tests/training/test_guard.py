"""The guard: what it objects to, what a skipped step leaves alone, where it says the trouble is."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

import yaml
from keel_megatron.config.guard import GuardConfig
from keel_megatron.errors import DivergedError
from keel_megatron.training.guard import Guard, robust_z
from tests.distributed import run_ranks
from tests.settings import settings
from tests.training import faults

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"parallel__pipeline": 2},
    "tp2-sp": {"parallel__tensor": 2, "parallel__sequence": True},
    "dp2-sharded": {},
    "dp2-bf16": {"training__precision": "bf16"},
    "dp2-replicated": {"parallel__distributed_optimizer": False},
    "dp2-muon": {"optimizer__name": "muon"},
    "tp2-muon-bf16": {
        "optimizer__name": "muon",
        "parallel__tensor": 2,
        "training__precision": "bf16",
    },
}


def guard(**values: Any) -> Guard:
    wanted = {"action": "skip", "window": 16, "min_steps": 8, "threshold": 6.0, "limit": 2}
    return Guard(GuardConfig(**(wanted | values)))


def warmed(**values: Any) -> Guard:
    """After twelve quiet steps."""
    warm = guard(**values)
    for number in range(12):
        warm.accept(2.0 + 0.01 * (number % 3), 1.0)
    return warm


def test_robust_z_by_hand() -> None:
    """Of 1..9 the median is 5 and the median distance from it 2; 1.4826 x 2 = 2.9652."""
    middle, z = robust_z(5.0 + 3 * 2.9652, deque(range(1, 10)))
    assert (middle, z) == (5.0, pytest.approx(3.0))


def test_one_wild_value_in_the_window_does_not_hide_the_next() -> None:
    """A mean and standard deviation of this window would call 50 ordinary: 4.6 + 3.3 x 14.0."""
    window = deque([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.1, 40.0, 1.0, 1.0])
    assert robust_z(50.0, window)[1] > 100


@pytest.mark.parametrize(
    ("loss", "grad_norm", "expected"),
    [
        (2.01, 1.0, None),
        (0.5, 0.1, None),  # a fall is no spike
        # The spread is 1 % of the median: 0.99 / 0.0201, 0.2 / 0.01.
        (3.0, 1.0, "loss 3 is 49.3 robust standard deviations above its median 2.01"),
        (2.01, 1.2, "grad_norm 1.2 is 20.0 robust standard deviations above its median 1"),
        (math.nan, 1.0, "loss is nan"),
        (2.01, math.inf, "grad_norm is inf"),
    ],
)
def test_what_is_found(loss: float, grad_norm: float, expected: str | None) -> None:
    anomaly = warmed().judge(loss, grad_norm)
    assert (str(anomaly) if anomaly else None) == expected


def test_spikes_need_a_window_and_numbers_do_not() -> None:
    fresh = guard()
    for _ in range(7):
        fresh.accept(1.0, 1.0)
    assert fresh.judge(99.0, 99.0) is None
    assert fresh.judge(math.nan, 1.0) is not None


def test_off_looks_for_no_spikes_and_still_for_numbers() -> None:
    off = warmed(action="off")
    assert off.judge(99.0, 99.0) is None
    assert str(off.judge(2.0, math.nan)) == "grad_norm is nan"


@pytest.mark.parametrize("action", ["off", "warn", "skip", "rollback"])
def test_only_a_spike_that_is_reported_is_taken(action: str) -> None:
    judging = warmed(action=action)
    spike, nan = warmed().judge(9.0, 1.0), judging.judge(math.nan, 1.0)
    assert spike is not None
    assert nan is not None
    assert judging.tolerates(spike) == (action == "warn")
    assert not judging.tolerates(nan)


def test_yaml_may_write_off_without_quotes() -> None:
    assert GuardConfig(action=False).action == "off"  # type: ignore[arg-type]


def test_the_state_goes_on_where_it_was() -> None:
    """Two guards, one through its state after every step, judge alike; the window moves on."""
    kept, restored = warmed(), guard()
    restored.restore(kept.state())
    for number in range(20):
        loss = 2.0 - 0.02 * number
        assert restored.judge(loss + 0.2, 1.0) == kept.judge(loss + 0.2, 1.0)
        kept.accept(loss, 1.0)
        restored.accept(loss, 1.0)
        other = guard()
        other.restore(restored.state())
        restored = other
    assert restored.state() == kept.state()
    assert len(kept.state()["windows"]["loss"]) == 16


@pytest.mark.parametrize(
    ("action", "loss"), [("skip", 9.0), ("off", math.nan), ("warn", math.nan), ("skip", math.inf)]
)
def test_left_out_updates_in_a_row_have_a_limit(action: str, loss: float) -> None:
    limited = warmed(action=action)
    anomaly = limited.judge(loss, 1.0)
    assert anomaly is not None
    for step in (1, 2):
        limited.note(step, anomaly)
    limited.accept(2.0, 1.0)  # the row ends
    for step in (4, 5):
        limited.note(step, anomaly)
    with pytest.raises(DivergedError, match=r"step 6 would be skipped update number 3 in a row"):
        limited.note(6, anomaly)
    assert limited.skipped == 5


def test_a_spike_that_is_taken_ends_the_row() -> None:
    limited = warmed(action="warn")
    for step in range(1, 8):
        anomaly = limited.judge(9.0 if step % 3 == 0 else math.nan, 1.0)
        assert anomaly is not None
        limited.note(step, anomaly)
    assert limited.skipped == 5


def test_an_anomaly_is_over_when_a_window_of_steps_was_accepted() -> None:
    """Counted from the latest anomaly, remembered from the first, through a checkpoint."""
    watching = warmed(action="warn")
    assert watching.anomaly_step is None
    for step, loss in enumerate([math.nan, *[2.0] * 15, 9.0, *[2.0] * 15], start=20):
        anomaly = watching.judge(loss, 1.0)
        if anomaly is None:
            watching.accept(loss, 1.0)
        else:
            watching.note(step, anomaly)
        restored = guard(action="warn")
        restored.restore(watching.state())
        watching = restored
        assert watching.anomaly_step == 20
    watching.accept(2.0, 1.0)
    assert watching.anomaly_step is None


def test_a_rollback_does_not_undo_what_the_guard_knows() -> None:
    """The older state comes back, but for the rollbacks and the anomaly."""
    back = warmed(action="rollback")
    older = back.state()
    anomaly = back.judge(math.nan, 1.0)
    assert anomaly is not None
    back.note(7, anomaly)
    back.note_rollback(7, anomaly)
    before = back.state()
    back.restore(older)
    back.keep_through_rollback(before)
    assert (back.rollbacks, back.anomaly_step, back.skipped) == ([7], 7, 0)


def test_a_state_of_an_older_version_is_gone_on_with() -> None:
    older = warmed().state()
    del older["anomaly"], older["accepted"]
    restored = guard()
    restored.restore(older)
    assert restored.anomaly_step is None


def test_rollbacks_have_a_limit_within_some_steps() -> None:
    limited = warmed(limit_steps=100)
    anomaly = limited.judge(9.0, 1.0)
    assert anomaly is not None
    for step in (10, 90, 150):
        limited.note_rollback(step, anomaly)
    with pytest.raises(DivergedError, match=r"step 160 would be rollback number 3 within"):
        limited.note_rollback(160, anomaly)


@pytest.fixture(scope="module")
def engines() -> dict[str, dict[str, Any]]:
    """What two ranks found at each layout."""
    runs = [settings(**overrides) for overrides in LAYOUTS.values()]
    ranks = run_ranks(2, faults.try_engines, runs)
    assert [found["where"] for found in ranks[0]] == [found["where"] for found in ranks[1]]
    return dict(zip(LAYOUTS, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refused_update_leaves_no_trace(layout: str, engines: dict[str, Any]) -> None:
    """The whole optimizer and all weights, on each rank; then it trains like one never asked."""
    for found in engines[layout]:
        assert found["before"] == found["after"]
        assert found["before"] != found["later"]
        assert found["later"] == found["never_asked"]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "muon" not in name])
def test_the_update_in_two_halves_is_megatrons_own_step(
    layout: str, engines: dict[str, Any]
) -> None:
    for found in engines[layout]:
        assert found["never_asked"] == found["megatrons"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_by_depth_make_up_the_whole(layout: str, engines: dict[str, Any]) -> None:
    """Root of the sum of squares: what Megatron-core's own norm is computed to be."""
    for found in engines[layout]:
        whole = math.sqrt(sum(norm**2 for norm in found["norms"]))
        assert whole == pytest.approx(found["grad_norm"], rel=1e-5)
        assert min(found["norms"]) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_place_is_named(layout: str, engines: dict[str, Any]) -> None:
    """Faults were made in block 6: in one gradient, in one weight, and by scaling its gradient."""
    stage = 1 if layout == "pp2" else 0
    gradient, weight, large = engines[layout][0]["where"]
    assert gradient == (
        "gradients are not finite in 1 of 10 places, in the backward pass first in block 6 "
        f"(stage {stage})"
    )
    assert weight.startswith(f"the stream is not finite from block 6 (stage {stage}) on; ")
    assert f"is that of block 6 (stage {stage})" in large
    assert large.startswith("the largest gradient norm, ")


def test_a_rollback_jumps_over_the_batches_since_the_checkpoint(tmp_path: Path) -> None:
    """Batch 3 is poisoned: back from step 4 to step 2, and on with batch 4, as computed apart."""
    sections = settings(
        training__runs_dir=str(tmp_path / "runs"),
        training__steps=5,
        data__cache_dir=str(tmp_path / "data"),
        data__text=torch.__file__,
        parallel__pipeline=2,
        model__dropout=0.1,
        checkpoint__every=2,
        guard__action="rollback",
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    (reported, expected, log), _ = run_ranks(2, faults.roll_back, path)
    assert reported == expected
    assert "guard, step 4 (rollback): grad_norm is nan; gradients are not finite in" in log
    assert "guard: back at step 2; the data continues after sequence 64" in log
