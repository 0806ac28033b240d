"""When depth profiles are drawn while a run trains."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from keel_megatron.config import UserError
from keel_megatron.depth.drawing import DepthDrawer, draw_profiles
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.run_log import METRICS_FILE
from tests.depth.test_profile import profile
from tests.tracking.samples import record


def test_drawing_takes_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, drawn = [0.0], []

    def plot(*_arguments: object) -> list[Path]:
        drawn.append(now[0])
        now[0] += 4.0  # a drawing takes so long
        return [tmp_path / "picture.png"]

    monkeypatch.setattr("keel_megatron.depth.pictures.plot_all", plot)
    drawer = DepthDrawer(tmp_path, clock=lambda: now[0])
    with MetricsFile(tmp_path / METRICS_FILE) as log:
        while now[0] < 10_000:
            now[0] += 100.0
            log.write(profile(int(now[0])))
            if drawer.is_due:
                drawer.draw()
        assert 10 <= len(drawn) <= 0.01 * now[0] / 4.0
        assert all(later - before >= 400 for before, later in itertools.pairwise(drawn))
        log.write(profile(20_000))
        assert drawer.draw() == [tmp_path / "picture.png"], "the last one, whenever it was drawn"
        assert drawer.draw() == [], "nothing new"


def test_a_run_without_profiles_has_no_pictures(tmp_path: Path) -> None:
    assert DepthDrawer(tmp_path).draw() == []
    with MetricsFile(tmp_path / METRICS_FILE) as log:
        log.write(record(1))
    assert draw_profiles(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_line_that_is_no_profile_fails_the_drawing_each_time_it_is_tried(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "depth": {}}\n')
    drawer = DepthDrawer(tmp_path)
    with pytest.raises(UserError, match="is not a depth profile"):
        drawer.draw()
    assert not drawer.is_due
