"""The run as MLflow has it: its parameters, changes, names and database."""

from __future__ import annotations

from pathlib import Path

from keel_megatron.mlflow_delivery.changes import Change
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, mlflow_client, mlflow_runs


def test_tags_say_which_parameters_are_no_longer_in_force(tmp_path: Path) -> None:
    """MLflow keeps a parameter's first value."""
    first, longer = config(tmp_path), config(tmp_path, training__steps=8)
    for name, run, back_to, tag in (
        ("a", first, None, None),
        ("b", longer, 0, "8"),
        ("c", first, 0, None),
    ):
        Session(run, name, back_to=back_to)
        deliver(first.training.folder)
        (found,) = mlflow_runs(longer)
        assert found.data.params["training.steps"] == "4"
        assert found.data.tags.get("config.training.steps") == tag


def test_changed_settings_are_a_history_without_what_is_void(tmp_path: Path) -> None:
    run = config(tmp_path)
    session = Session(run, "a")
    session.put("tags", tags={"changed.optimizer.learning_rate": "0.1"})  # an earlier version's
    rate = [Change(step, "optimizer.learning_rate", 1e-3, 1e-4) for step in (6, 8)]
    steps = Change(6, "training.steps", 6, 12)
    long = Change(10, "data.text", None, ["x" * 9000])
    for changes, tags in (
        ([rate[0], steps, rate[1]], {"6": f"{rate[0]}; {steps}", "8": str(rate[1])}),
        ([rate[0], steps], {"6": f"{rate[0]}; {steps}"}),
        ([long], {"10": f"data.text null -> ['{'x' * 195}..."}),
        ([], {}),
    ):
        session.put("changes", changes=[change.to_json() for change in changes])
        deliver(session.folder)
        (found,) = mlflow_runs(run)
        shown = {k: v for k, v in found.data.tags.items() if k.startswith("changed.")}
        assert shown == {f"changed.step_{int(step):08d}": text for step, text in tags.items()}
    assert str(rate[0]) == "optimizer.learning_rate 0.001 -> 0.0001"


def test_an_infinite_value_is_nan(tmp_path: Path) -> None:
    """MLflow itself would make it 1.8e308."""
    run = config(tmp_path)
    session = Session(run, "a")
    session.record(1, loss=float("inf"), grad_norm=float("-inf"))
    deliver(session.folder)
    (found,) = mlflow_runs(run)
    assert {name: str(value) for name, value in found.data.metrics.items()} == {
        "train/loss": "nan",
        "train/grad_norm": "nan",
    }


def test_there_is_no_empty_default_experiment(tmp_path: Path) -> None:
    run = config(tmp_path)
    deliver(Session(run, "a").folder)
    assert [found.name for found in mlflow_client(run).search_experiments()] == ["keel"]
    default = config(tmp_path, training__name="other", tracking__experiment="Default")
    deliver(Session(default, "a").folder)
    assert len(mlflow_runs(default)) == 1


def test_files_are_in_the_run_s_folder_and_mlflow_finds_them(tmp_path: Path) -> None:
    """Also after the run's folder, or the folder of runs, was moved."""
    run = config(tmp_path / "runs")
    session = Session(run, "a")
    (session.folder / "note.txt").write_text("kept")
    session.put("artifact", path="note.txt")
    deliver(session.folder)
    run_id = mlflow_runs(run)[0].info.run_id
    kept = session.folder / "mlflow_artifacts" / run_id / "artifacts" / "note.txt"
    assert kept.read_text() == "kept"
    link = tmp_path / "runs" / "mlflow_artifacts" / run_id
    assert link.resolve() == kept.parent.parent
    client = mlflow_client(run)
    assert [file.path for file in client.list_artifacts(run_id)] == ["note.txt"]
    assert Path(client.download_artifacts(run_id, "note.txt")).read_text() == "kept"
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "mlflow_artifacts" / run_id
    assert (moved / "artifacts" / "note.txt").read_text() == "kept"


def test_a_run_that_moves_to_another_folder_of_runs_brings_its_files(tmp_path: Path) -> None:
    first, second = config(tmp_path / "a"), config(tmp_path / "b")
    session = Session(first, "a")
    (session.folder / "note.txt").write_text("kept")
    session.put("artifact", path="note.txt")
    deliver(session.folder)
    session.folder.rename(second.training.folder)
    said: list[str] = []
    Session(second, "b", back_to=0)
    deliver(second.training.folder, said)
    (found,) = mlflow_runs(second)
    assert "a new one is made" in said[0]
    assert [f.path for f in mlflow_client(second).list_artifacts(found.info.run_id)] == ["note.txt"]
