"""A study's runs are children of its MLflow run, whatever id that has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keel_megatron.mlflow_delivery.study import PARENT_TAG, StudyLog, parent_run_id
from keel_megatron.mlflow_delivery.sync import sync
from keel_megatron.mlflow_delivery.target import remembered_run_id
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, mlflow_client, mlflow_runs


def by_name(run: Any) -> dict[str, Any]:
    return {found.info.run_name: found for found in mlflow_runs(run)}


def test_runs_are_children_of_their_study_also_after_a_rebuild(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'all.db'}"
    run = config(tmp_path, tracking__uri=uri)
    folder = run.training.folder.parent
    study = StudyLog("alpha", folder, run, {"points": "1"})
    sync(study.folder, [uri])
    child = Session(run, "a")
    child.losses({1: 5.0})
    child.put("end", status="FINISHED")
    (child.folder / "config.yaml").touch()
    deliver(child.folder, to=uri)
    (folder / "results.json").write_text("{}")
    study.end("FINISHED", [folder / "results.json"])
    sync(study.folder, [uri])

    found = by_name(run)
    parent, trained = found["study alpha"], found[run.training.name]
    assert trained.data.tags[PARENT_TAG] == parent.info.run_id
    assert PARENT_TAG not in parent.data.tags
    assert parent.data.params == {"points": "1"}
    assert parent.info.status == "FINISHED"

    # MLflow loses both: the new child is the new parent's.
    for one in (parent, trained):
        mlflow_client(run).delete_run(one.info.run_id)
    for place in (study.folder, child.folder):
        sync(place, [uri], rebuild=True)
    again = by_name(run)
    assert again["study alpha"].info.run_id != parent.info.run_id
    assert again[run.training.name].data.tags[PARENT_TAG] == again["study alpha"].info.run_id


def test_a_study_that_resumes_is_one_mlflow_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'all.db'}"
    run = config(tmp_path, tracking__uri=uri)
    for status in ("KILLED", "FINISHED"):
        study = StudyLog("alpha", tmp_path, run, {})
        study.end(status)  # type: ignore[arg-type]
        sync(study.folder, [uri])
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"


def test_a_folder_that_is_called_study_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mlflow_run_id").write_text("0" * 32)
    assert remembered_run_id(tmp_path / "study") == "0" * 32
    assert parent_run_id(tmp_path / "run") is None
    (tmp_path / "study" / "study.json").write_text("{}")
    assert parent_run_id(tmp_path / "run") == "0" * 32
    assert parent_run_id(tmp_path / "study") is None
