"""The identity of a run's folder: moved, copied, and of an earlier version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from keel_megatron.dashboard.shown import choose
from keel_megatron.mlflow_delivery.outbox_reader import Waiting
from keel_megatron.mlflow_delivery.run_file import original_of, read_run_file, take_run_file
from keel_megatron.mlflow_delivery.sync import add_file, sync
from keel_megatron.mlflow_delivery.target import remembered_run_id
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs


def report(run: Any, step: int, back_to: int | None = None) -> list[str]:
    """A start that is accepted, makes a step, leaves a file and ends; what it was told."""
    folder: Path = run.training.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    _identity, lines = take_run_file(folder, back_to or 0)
    log(run, step, back_to)
    _artifact_repos_cache.clear()  # every start has a worker's process of its own
    deliver(folder, lines, run.tracking.uri)
    return lines


def log(run: Any, step: int, back_to: int | None = None) -> None:
    folder: Path = run.training.folder
    (folder / "note.txt").write_text(f"{run.training.name}, step {step}")
    session = Session(run, f"start {step}", back_to)
    session.losses({step: float(step)})
    session.put("artifact", path="note.txt")
    session.put("end", status="FINISHED")
    session.log.close()


def notes(run: Any) -> list[str]:
    paths = run.training.folder.glob("mlflow_artifacts/*/artifacts/note.txt")
    return [path.read_text() for path in paths]


def test_a_moved_folder_is_the_same_run_with_its_files_in_the_new_place(tmp_path: Path) -> None:
    old, new = config(tmp_path, training__name="old"), config(tmp_path, training__name="new")
    report(old, 1)
    before = read_run_file(old.training.folder)
    run_id = remembered_run_id(old.training.folder)
    old.training.folder.rename(new.training.folder)
    assert report(new, 2, back_to=1) == [f"the run was moved here from {old.training.folder}"]
    after = read_run_file(new.training.folder)
    assert before is not None
    assert after is not None
    assert (after.id, after.place) == (before.id, str(new.training.folder))
    assert after.origin is None
    assert not old.training.folder.exists(), "nothing is written at the old place"
    (found,) = mlflow_runs(new)
    assert (found.info.run_id, found.info.run_name) == (run_id, "new")
    assert history(new, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert notes(new) == ["new, step 2"]
    assert [file.path for file in mlflow_client(new).list_artifacts(run_id)] == ["note.txt"]
    assert found.data.tags["config.training.name"] == "new", "the setting in force"


def test_a_name_that_was_given_in_mlflow_stays(tmp_path: Path) -> None:
    run = config(tmp_path)
    report(run, 1)
    mlflow_client(run).update_run(remembered_run_id(run.training.folder), name="the good one")
    report(run, 2, back_to=1)
    assert mlflow_runs(run)[0].info.run_name == "the good one"


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_a_run_of_its_own(tmp_path: Path, shared: bool) -> None:
    """With the database of the folder of runs, and with one that tracking.uri names."""
    uri = f"sqlite:///{tmp_path / 'all.db'}" if shared else None
    first = config(tmp_path, training__name="first", tracking__uri=uri)
    second = config(tmp_path, training__name="second", tracking__uri=uri)
    report(first, 1)
    log(first, 2, back_to=1)  # waits, also in the copy
    shutil.copytree(first.training.folder, second.training.folder)
    known = read_run_file(first.training.folder)
    run_id = remembered_run_id(first.training.folder)
    assert known is not None
    (line,) = report(second, 3, back_to=1)
    assert line.startswith(f"this folder is a copy of {first.training.folder}, which keeps")
    copy = read_run_file(second.training.folder)
    assert copy is not None
    assert copy.origin is not None
    assert copy.origin.tags() == {
        "origin.id": known.id,
        "origin.place": str(first.training.folder),
        "origin.step": "1",
        "origin.mlflow_run_id": run_id,
    }
    own_id = remembered_run_id(second.training.folder)
    assert copy.id != known.id
    assert own_id != run_id
    assert history(second, own_id, "train/loss") == [(3, 3.0)]
    assert history(first, run_id, "train/loss") == [(1, 1.0)], "what waits is the original's"
    assert "delivered 1 point(s)" in sync(first.training.folder, [uri] if uri else [])[0]
    assert history(first, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert {found.info.run_name for found in mlflow_runs(second)} == {"first", "second"}
    if not shared:
        assert (notes(first), notes(second)) == (["first, step 2"], ["second, step 3"])
        aside = second.training.folder / "origin" / known.id
        assert {path.name for path in aside.iterdir()} == {
            *("mlflow_artifacts", "mlflow_run_id", "outbox")
        }
    assert report(second, 4, back_to=3) == [], "a later start of the copy is like any other"
    again = read_run_file(second.training.folder)
    assert again == copy


def test_a_copy_that_was_not_started_delivers_and_shows_nothing(tmp_path: Path) -> None:
    run = config(tmp_path)
    report(run, 1)
    log(run, 2, back_to=1)
    copy = tmp_path / "copy"
    shutil.copytree(run.training.folder, copy)
    (line,) = sync(copy)
    assert line == (
        f"{copy}: nothing to deliver: it is a copy of {run.training.folder}, which delivers its "
        "own reports"
    )
    add_file(copy, copy / "note.txt", None)
    assert Waiting.of(copy).points == 1, "untouched"
    shown = choose([run.training.folder, copy])
    assert shown.database == tmp_path / "mlflow.db"
    assert shown.others == [f"copy is a copy of {run.training.folder} that was not started yet"]


def test_another_way_to_the_same_folder_is_no_copy(tmp_path: Path) -> None:
    home = tmp_path / "run"
    home.mkdir()
    first, _ = take_run_file(home)
    (tmp_path / "link").symlink_to(home)
    assert take_run_file(tmp_path / "link") == (first, [])
    assert original_of(tmp_path / "link") is None


def test_a_folder_without_an_identity_gets_one_or_the_checkpoint_s(tmp_path: Path) -> None:
    """One that an earlier version wrote; and one whose file was lost, or checkpoints copied."""
    earlier, lost, copied = tmp_path / "earlier", tmp_path / "lost", tmp_path / "copied"
    for folder in (earlier, lost, copied):
        folder.mkdir()
    (earlier / "mlflow_run_id").write_text("feed")
    (earlier / "run.json").write_text("{")
    first, lines = take_run_file(earlier)
    assert (lines, remembered_run_id(earlier)) == ([], "feed")
    saved = json.loads((earlier / "run.json").read_text())
    copy, lines = take_run_file(copied, 7, saved)
    assert len(lines) == 1
    assert copy.id != first.id
    assert copy.origin is not None
    assert (copy.origin.id, copy.origin.step) == (first.id, 7)
    (earlier / "run.json").unlink()
    same, _ = take_run_file(lost, 7, saved)
    assert (same.id, same.place) == (first.id, str(lost))


@pytest.mark.security
def test_an_id_is_no_path(tmp_path: Path) -> None:
    """A copy's files are set aside under its original's id."""
    original, copy = tmp_path / "a" / "original", tmp_path / "b" / "copy"
    evil = json.dumps({"id": "../../../outside", "place": str(original), "origin": None})
    for folder in (original, copy):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(evil)
        (folder / "mlflow_run_id").write_text("text")
    assert original_of(copy) is None
    take_run_file(copy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (copy / "mlflow_run_id").is_file()
