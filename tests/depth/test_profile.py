"""Depth profiles: their file, summary, table and pictures."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread

from keel_megatron.config import UserError
from keel_megatron.depth.pictures import draw_heat_map, plot_all, plot_quantity
from keel_megatron.depth.profile import (
    QUANTITIES,
    DepthProfile,
    first_nonfinite,
    not_recorded,
    read_profiles,
)
from keel_megatron.depth.table import draw, select, table
from keel_megatron.mlflow_delivery.reporting import open_tracker
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.run_log import METRICS_FILE, RunLog
from keel_megatron.tracking.style import ALARM, NOTHING
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs


def profile(step: int, sub_layers: int = 6, **values: Any) -> DepthProfile:
    """Every quantity 10^-l at sub-layer l, but for what is given."""
    depth = np.arange(sub_layers)
    plain = dict.fromkeys(QUANTITIES, 10.0**-depth) | values
    absent = {"outer_gain": depth == 0, "attention_logit": depth % 2 == 1}
    return DepthProfile.of(step, plain, absent)


def test_a_profile_comes_back_to_the_last_bit_and_absent_is_not_nan(tmp_path: Path) -> None:
    rough = np.float32([1 / 3, math.nan, math.inf, -math.inf, 1e-45, 3.4e38])
    with MetricsFile(tmp_path / METRICS_FILE) as log:
        log.write(profile(1, branch_rms=rough, outer_gain_min=rough, weight_rms=[1e300] * 6))
    (found,) = read_profiles(tmp_path)
    np.testing.assert_array_equal(found.values["branch_rms"].data, rough)
    assert found.values["weight_rms"][5] == math.inf, "past fp32"
    assert found.values["outer_gain_min"].mask.tolist() == [True] + [False] * 5
    assert first_nonfinite(found.values["outer_gain_min"]) == 1
    assert first_nonfinite(found.values["attention_logit_max"]) is None
    line = (tmp_path / METRICS_FILE).read_text()
    assert '"branch_rms": [0.33333334, NaN, Infinity, -Infinity, 1e-45, 3.4e+38]' in line
    assert '"outer_gain_min": [null, NaN,' in line


def test_an_optional_quantity_that_no_sub_layer_has_is_not_written() -> None:
    with_it = DepthProfile.of(1, {name: [1.0, 0.5] for name in QUANTITIES}, {})
    without = DepthProfile.of(1, with_it.values, {"update_kept": [True, True]})
    assert with_it.to_json()["depth"]["update_kept"] == [1.0, 0.5]
    record = without.to_json()
    assert "update_kept" not in record["depth"]
    assert not DepthProfile.from_json(record).missing


def test_what_an_older_version_did_not_note_is_left_out_and_said(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / METRICS_FILE) as log:
        for step in (1, 2, 4):
            log.write(profile(step))
    path = tmp_path / METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for old in lines[:2]:
        del old["depth"]["attention_logit_max"], old["depth"]["gradient_norm"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_profiles(tmp_path)
    times = [{"time": line["time"]} for line in lines]
    assert [f.to_json() | t for f, t in zip(found, times, strict=True)] == lines
    assert not_recorded(found) == "not recorded at steps 1 to 2: gradient_norm, attention_logit_max"
    assert not_recorded(found[2:]) is None
    assert "gradient_norm" not in table(found[0], select(found, None, 2), None)
    assert "gradient_norm" in table(found[0], select(found, None, None), None)
    assert "depth.gradient_norm.min" not in found[0].summary()
    with pytest.raises(UserError, match=r"gradient_norm was not recorded at step 2; try --step"):
        select(found, "gradient_norm", 2)
    shown = select(found, "gradient_norm", 4)
    (large,) = draw(found, shown, "gradient_norm", "run", tmp_path)
    maps, _lines = draw(found, shown, None, "run", tmp_path)
    assert large.is_file()
    assert maps.is_file()
    path.write_text('{"step": 1, "depth": {}}\n')
    with pytest.raises(
        UserError, match=r"the line of step 1 is not a depth profile \(no quantity\)"
    ):
        read_profiles(tmp_path)


def test_profiles_of_an_earlier_version_are_read_and_rewound_too(tmp_path: Path) -> None:
    """They stand in depth.jsonl, flat; a run that resumes writes new ones to metrics.jsonl."""
    earlier = [profile(step) for step in (1, 2, 4, 6)]
    flat = [{"step": p.step, **p.to_json()["depth"]} for p in earlier]
    (tmp_path / "depth.jsonl").write_text("".join(json.dumps(line) + "\n" for line in flat))
    assert [p.to_json() for p in read_profiles(tmp_path)] == [p.to_json() for p in earlier]
    log = RunLog(tmp_path, 5)
    log.write(profile(6, stream_rms=[7.0] * 6))
    log.write(profile(8))
    found = read_profiles(tmp_path)
    assert [p.step for p in found] == [1, 2, 4, 6, 8]
    assert found[3].values["stream_rms"][0] == 7.0
    log.rewind(2)
    assert [p.step for p in read_profiles(tmp_path)] == [1, 2]
    log.close()
    RunLog(tmp_path, None).close()
    with pytest.raises(UserError, match=r"no depth profiles; tracking.depth_every"):
        read_profiles(tmp_path)


def test_the_summary_leaves_out_what_is_not_finite_and_says_where_it_begins() -> None:
    found = profile(3, branch_rms=[4.0, 1.0, 2.0, math.nan, 9.0, math.inf])
    summary = found.summary()
    assert {key: value for key, value in summary.items() if "branch_rms" in key} == {
        "depth.branch_rms.min": 1.0,
        "depth.branch_rms.median": 3.0,
        "depth.branch_rms.max": 9.0,
        "depth.branch_rms.first_nonfinite": 3.0,
    }
    assert summary["depth.outer_gain_mean.max"] == pytest.approx(0.1)  # sub-layer 0 has none
    assert summary["depth.attention_logit_max.median"] == pytest.approx(0.01)
    assert sum("first_nonfinite" in key for key in summary) == 1
    assert found.alarm() == "step 3: not finite: branch_rms from sub-layer 3"
    assert profile(3).alarm() is None
    nothing = profile(3, branch_rms=[math.nan] * 6).summary()
    found = [key for key in nothing if "branch_rms" in key]
    assert found == ["depth.branch_rms.first_nonfinite"]


def test_mlflow_gets_the_summary_and_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.depth(profile(1))
        tracker.depth(profile(2, stream_rms=[1.0, 2.0, math.nan, 1.0, 1.0, 1.0]))
    (found,) = mlflow_runs(run)
    key = "depth.stream_rms.max"
    assert history(run, found.info.run_id, key) == [(1, 1.0), (2, 2.0)]
    assert history(run, found.info.run_id, "depth.stream_rms.first_nonfinite") == [(2, 2.0)]
    files = {file.path for file in mlflow_client(run).list_artifacts(found.info.run_id)}
    assert files == {"depth_heat_maps.png", "depth_latest.png", "log.txt"}
    assert "step 2: not finite: stream_rms from sub-layer 2" in capsys.readouterr().out


def test_a_picture_that_fails_is_said_and_the_run_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path, tracking__mlflow=False, tracking__depth_every=1)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.depth(profile(1))
        shutil.rmtree(tracker.folder)
    assert "cannot draw the depth profiles: UserError" in capsys.readouterr().out


def test_without_mlflow_the_pictures_are_drawn_at_the_end(tmp_path: Path) -> None:
    run = config(tmp_path, tracking__mlflow=False, tracking__depth_every=1)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.depth(profile(1))
        assert not list(tracker.folder.glob("*.png"))
    names = {path.name for path in tracker.folder.iterdir()}
    assert names == {"depth_heat_maps.png", "depth_latest.png", "metrics.jsonl"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: object, **options: object) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def colours_of(axes: Axes) -> np.ndarray:
    """The heat map's cells as RGBA, [rows, steps, 4]."""
    cells = np.asarray(axes.images[0].get_array())
    return cells / 255 if cells.dtype == np.uint8 else cells


def test_the_pictures_show_the_values(tmp_path: Path, figures: list[Figure]) -> None:
    bad = [1.0, 0.1, math.nan, math.inf, 0.1, 1.0]
    profiles = [profile(1), profile(100), profile(200, branch_rms=bad)]
    pictures = plot_all(profiles, "demo", tmp_path)
    assert [path.name for path in pictures] == ["depth_heat_maps.png", "depth_latest.png"]
    assert all(imread(path).std() > 0.05 for path in pictures), "not a blank picture"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in pictures}
    heat, lines = figures
    panel = list(QUANTITIES).index("branch_rms")
    cells = colours_of(heat.axes[panel])
    assert cells.shape[:2] == (6, 3)
    pink = np.isclose(cells, to_rgba(ALARM), atol=0.01).all(-1)
    assert np.argwhere(pink).tolist() == [[2, 2], [3, 2]]
    assert heat.axes[panel].get_xlim() == (1, 200)
    outer = colours_of(heat.axes[list(QUANTITIES).index("outer_gain_min")])
    pale = np.isclose(outer, to_rgba(NOTHING), atol=0.01).all(-1)
    assert np.argwhere(pale)[:, 0].tolist() == [0, 0, 0]
    attention, ffn, now_attention, now_ffn, alarm = lines.axes[panel].lines
    assert attention.get_ydata().tolist() == pytest.approx([1.0, 1e-2, 1e-4])
    assert ffn.get_xdata().tolist() == [1, 3, 5]
    assert now_attention.get_ydata().filled(9).tolist() == pytest.approx([1.0, 9, 0.1])
    assert now_ffn.get_ydata().filled(9).tolist() == pytest.approx([0.1, 9, 1.0])
    assert alarm.get_xdata() == [2, 2]
    assert lines.axes[panel].get_yscale() == "log"


def test_a_deep_model_s_rows_are_groups_and_one_bad_value_shows() -> None:
    values = np.linspace(1.0, 2.0, 1000)
    values[777] = math.nan
    axes = Figure().subplots()
    draw_heat_map(axes, [profile(1, 1000, weight_rms=values)], "weight_rms", colour_bar=False)
    cells = colours_of(axes)
    assert cells.shape[:2] == (125, 1)
    pink = np.isclose(cells, to_rgba(ALARM), atol=0.01).all(-1)
    assert np.flatnonzero(pink).tolist() == [777 // 8]
    assert axes.get_ylim() == (0, 1000)


@pytest.mark.parametrize(("sub_layers", "value"), [(2, 0.0), (130, 1.0), (6, math.nan)])
@pytest.mark.parametrize("quantity", ["gradient_norm", "update_cosine"])
def test_odd_profiles_are_drawn_too(
    tmp_path: Path, sub_layers: int, value: float, quantity: str
) -> None:
    profiles = [profile(5, sub_layers, **{quantity: [value] * sub_layers})]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = plot_quantity(profiles, quantity, "odd", tmp_path, profiles[0])
    assert picture.stat().st_size > 10_000


def test_the_table_of_all_quantities_and_of_one() -> None:
    first = profile(1, 40)
    bad = np.where(np.arange(40) == 37, math.nan, np.arange(40.0))
    shown = profile(8, 40, branch_rms=bad)
    lines = table(first, shown, None).splitlines()
    assert lines[0] == "40 sub-layers at step 8"
    assert lines[1].split()[-6:] == ["median,", "step", "1", "not", "finite", "from"]
    assert [line.split()[0] for line in lines[2:]] == list(QUANTITIES)
    (row,) = [line.split() for line in lines if line.startswith("branch_rms")]
    assert row == ["branch_rms", "0", "19", "39", "5.5e-20", "37"]
    groups = table(first, shown, "branch_rms").splitlines()
    assert groups[0] == "branch_rms: RMS of the branch, 40 sub-layers at step 8"
    assert len(groups) == 2 + 10
    assert groups[3].split() == ["4", "-", "7", "4", "5.5", "7", "5.5e-06", *[]]
    assert groups[-1].split()[:6] == ["36", "-", "39", "36", "38", "39"]
    assert groups[-1].split()[-1] == "37"
    assert len(table(profile(1), profile(2), "stream_rms").splitlines()) == 2 + 6


def test_what_a_user_gets_wrong_is_named(tmp_path: Path) -> None:
    depth = np.arange(6)
    post_ln = DepthProfile.of(1, dict.fromkeys(QUANTITIES, 1.0 + depth), {"inner_gain": [True] * 6})
    profiles = [post_ln, profile(100), profile(200)]
    assert select(profiles, "gradient_norm", None) is profiles[-1]
    assert select(profiles, None, 100) is profiles[1]
    with pytest.raises(UserError, match=r"--step: there is no profile of step 3; .* 1, 100, 200"):
        select(profiles, None, 3)
    with pytest.raises(UserError, match="no sub-layer of this run has inner_gain_max"):
        select(profiles[:1], "inner_gain_max", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out: cannot write into"):
        draw(profiles, profiles[0], None, "run", tmp_path / "file")


@pytest.mark.parametrize(
    ("steps", "ticks"),
    [
        ((1, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200), [1, 50, 100, 150, 200]),
        ((1, 2), [1, 2]),
        ((7,), [7]),
    ],
)
def test_a_heat_map_begins_and_ends_with_its_steps(
    steps: tuple[int, ...], ticks: list[int]
) -> None:
    axes = Figure().subplots()
    draw_heat_map(axes, [profile(step) for step in steps], "stream_rms")
    assert axes.get_xticks().tolist() == ticks
    if len(steps) > 1:
        assert axes.get_xlim() == (steps[0], steps[-1])


@pytest.mark.security
@pytest.mark.parametrize(
    "depth",
    [
        '{"gradient_norm": 5}',
        '{"gradient_norm": [1, 2], "stream_rms": [1]}',
        '{"gradient_norm": [{}, 1]}',
        '{"gradient_norm": [1, 2, 3]}',
        "[]",
        '"text"',
        "5",
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("step", ["3", "1" + "0" * 400, "1" + "0" * 5000])
def test_a_line_of_anything_is_named(tmp_path: Path, step: str, depth: str) -> None:
    good = '{"step": 1, "depth": {"gradient_norm": [1, 2]}}\n'
    line = f'{{"step": {step}, "depth": {depth}}}\n'
    (tmp_path / METRICS_FILE).write_text(good + line + good)
    with pytest.raises(UserError, match=r"metrics.jsonl(: the line of step 3|, line 2)"):
        read_profiles(tmp_path)
