"""Paths with characters that mean something in a URI."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from keel_megatron.dashboard.shown import choose
from keel_megatron.mlflow_delivery.database import local_uri
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_file, sqlite_uri
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config

STRANGE = [
    "50% #1?a=b/my runs",
    "pc%41t",
    "100%",
    'it\'s "so"',
    "Läufe",
    "a&b;c:d=e@f",
    "back\\slash",
    "[x] {y}",
]


@pytest.mark.parametrize("name", [*STRANGE, "plain"])
def test_a_path_is_the_same_to_sqlalchemy_and_to_us(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "mlflow.db"
    url = make_url(sqlite_uri(path))
    assert (url.database, dict(url.query)) == (str(path), {})
    assert sqlite_file(sqlite_uri(path)) == path


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:///runs/all.db", "runs/all.db"),
        ("sqlite:////big disk/all.db?timeout=9", "/big disk/all.db"),
        ("sqlite:////a%3Fb/all.db", "/a?b/all.db"),
        ("http://host:5000", None),
        ("postgresql://db/runs", None),
    ],
)
def test_the_file_of_a_uri(uri: str, path: str | None) -> None:
    assert sqlite_file(uri) == (None if path is None else Path(path))


def test_a_run_in_a_strange_folder_has_its_database_and_files_there(tmp_path: Path) -> None:
    """And MLflow makes no folder beside it, of the quoted name."""
    run = config(tmp_path / "50% #1?a=b" / "pc%41t's Läufe")
    run.training.folder.mkdir(parents=True)
    (run.training.folder / "config.yaml").touch()
    (run.training.folder / "note.txt").write_text("kept")
    Session(run, "a").put("artifact", path="note.txt")
    said: list[str] = []
    deliver(run.training.folder, said)
    assert said == []
    assert [path.name for path in tmp_path.iterdir()] == ["50% #1?a=b"]
    database = run.training.runs_dir / "mlflow.db"
    assert sqlite_file(local_uri(run.training.folder)) == database
    (kept,) = run.training.folder.glob("mlflow_artifacts/*/artifacts/note.txt")
    assert kept.read_text() == "kept"
    shown = choose([run.training.folder])
    assert (shown.database, shown.others) == (database, [])
