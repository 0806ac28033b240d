"""A grid's runs: names that say what determines their numbers, and every problem at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import yaml
from keel_megatron.errors import UserError
from keel_megatron.studies import alpha
from keel_megatron.studies.grid import Axes, Grid, Point, Study, make_grid
from tests.settings import settings, small_config


def write(folder: Path, **overrides: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(data__text=[str(Path(__file__))], **overrides)))
    return path


def study(*points: Point) -> Study:
    return Study("test", points, table=lambda _rows: "", picture=lambda _rows, _out: None)


def rates(*values: float) -> Study:
    return study(*(Point(f"lr{v:g}", {"optimizer.learning_rate": v}, {"lr": v}) for v in values))


def grid(path: Path, one: Study, *overrides: str, **options: int) -> Grid:
    return make_grid(one, path, overrides, path.parent / "out", **options)


def names(found: Grid) -> list[str]:
    return [run.name for run in found.runs]


def test_every_point_is_run_with_every_seed(tmp_path: Path) -> None:
    found = grid(write(tmp_path), rates(1e-3, 1e-5), seeds=2)
    assert [(run.point.name, run.seed) for run in found.runs] == [
        *(("lr0.001", 1234), ("lr0.001", 1235)),
        *(("lr1e-05", 1234), ("lr1e-05", 1235)),
    ]
    last = found.runs[-1].config
    assert (last.optimizer.learning_rate, last.training.seed) == (1e-5, 1235)
    assert last.training.folder == tmp_path / "out" / last.training.name
    assert found.runs[-1].labels == {"lr": 1e-5, "seed": 1235}


def test_a_name_depends_on_what_determines_the_numbers(tmp_path: Path) -> None:
    """Not on threads, places or reports: a study resumes under others."""
    before = grid(write(tmp_path), rates(1e-3, 1e-2))
    free = ["training.threads=2", "checkpoint.every=7", "tracking.mlflow=true"]
    assert names(grid(write(tmp_path), rates(1e-3), *free, parallel=2)) == names(before)[:1]
    changed = grid(write(tmp_path), rates(1e-3, 1e-2), "training.steps=5")
    assert not set(names(changed)) & set(names(before))
    # The same name of a point with other overrides is another run, too.
    other = study(Point("lr0.001", {"optimizer.learning_rate": 2e-3}, {}))
    assert names(grid(write(tmp_path), other)) != names(before)[:1]


def test_runs_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel_megatron.studies.grid.available_cores", lambda: 8)
    path = write(tmp_path, training__threads=0)
    for options, threads in (({}, 8), ({"parallel": 4}, 2), ({"parallel": 0}, 0)):
        (run,) = grid(path, rates(1e-3), **options).runs
        assert run.config.training.threads == threads
    (run,) = grid(path, rates(1e-3), "parallel.pipeline=2", parallel=2).runs
    assert (run.config.training.threads, run.processes) == (2, 2)


def test_all_problems_of_all_points_are_reported_at_once(tmp_path: Path) -> None:
    wrong = study(
        Point("a", {"model.blocks": 0}, {}),
        Point("b", {"model.residual": "none"}, {}),
        Point("c", {}, {}),
    )
    with pytest.raises(UserError) as caught:
        grid(write(tmp_path), wrong, "data.tokenizer=absent.model", seeds=2)
    text = str(caught.value)
    assert "the grid of the study test is not valid" in text
    assert "model.blocks" in text
    assert "(2 runs)" in text
    assert "model.residual" in text
    assert text.count("data.tokenizer: absent.model does not exist") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.learning_rate=1", "the study test sets it for each of its runs"),
        ("training.name=x", "--out chooses the folder"),
        ("training.runs_dir=x", "--out chooses the folder"),
    ],
)
def test_the_study_and_its_user_do_not_set_the_same_thing(
    tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        grid(write(tmp_path), rates(1e-3), override)


def test_a_setting_that_the_study_leaves_as_it_is_can_be_given(tmp_path: Path) -> None:
    """Such as a depth, when the study's own is the configuration's."""
    one = study(Point("a", {"model.blocks": 2}, {}))
    (run,) = grid(write(tmp_path), one, "model.blocks=2").runs
    assert run.config.model.blocks == 2


def test_alphas_go_from_1_to_4_times_the_depth(tmp_path: Path) -> None:
    found = alpha.study(small_config(), Axes((), (16,)))
    grid(write(tmp_path), found)
    swept = [p.labels["alpha"] for p in found.points if not p.labels["variant"]]
    assert swept == [1.0, 4.0, 8.0, 16.0, 32.0, 64.0]  # the root of 16 is a quarter of it
    variants = [p for p in found.points if p.labels["variant"]]
    assert [p.overrides["model.alpha"] for p in variants] == [16.0, 16.0]
    assert variants[0].overrides["model.first_block"] == "v1"
    assert variants[1].overrides["model.final_norm"] is False


def test_alpha_needs_rules_that_have_one() -> None:
    with pytest.raises(UserError, match="--rules: pre_ln has no alpha; choose among keel, "):
        alpha.study(small_config(), Axes(("pre_ln",), (8,)))
    with pytest.raises(UserError, match="--depths: 7 must be even"):
        alpha.study(small_config(), Axes((), (7,)))
