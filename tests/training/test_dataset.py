"""A run's dataset is made ready before its ranks meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.device import Launch
from keel_megatron.training import dataset as training_dataset
from keel_megatron.training.dataset import (
    DATASET,
    dataset_of_rank,
    given_dataset,
    ready_dataset,
    trained_on,
)
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.settings import small_config


def config(tmp_path: Path, **overrides: Any) -> RunConfig:
    return small_config(
        **{
            "data__cache_dir": str(tmp_path / "cache"),
            "data__vocab_size": VOCABULARY,
            "training__runs_dir": str(tmp_path / "runs"),
            **overrides,
        }
    )


@pytest.fixture
def built(tmp_path: Path) -> RunConfig:
    place = write_dataset(tmp_path / "set", {"web": [made_up(60, 0)], "books": [made_up(40, 1)]})
    return config(tmp_path, data__dataset=str(place))


def silent(_text: str) -> None:
    pass


def test_a_dataset_that_is_ready_has_its_index_files(built: RunConfig) -> None:
    assert ready_dataset(built, silent, on_one_machine=False) == built.data.dataset
    made = [path.name for path in (built.data.cache_dir / "index").iterdir() if path.is_dir()]
    assert len(made) == 4
    assert sorted(name.split("-")[1] for name in made) == ["books", "books", "web", "web"]
    said: list[str] = []
    ready_dataset(built, said.append, on_one_machine=False)
    assert said == []


@pytest.mark.parametrize(
    ("build", "local", "said"),
    [("never", True, "data.build is never"), ("auto", False, "on one machine only")],
)
def test_nothing_is_built_where_it_may_not_be(
    tmp_path: Path, build: str, local: bool, said: str
) -> None:
    text = tmp_path / "text"
    text.write_text("some words\n" * 100)
    wanted = config(tmp_path, data__text=str(text), data__build=build)
    with pytest.raises(UserError, match=rf"{said}; build it first: keel data build CONFIG"):
        ready_dataset(wanted, silent, on_one_machine=local)
    assert not list((tmp_path / "cache").glob("*/data.json"))


def test_one_rank_of_each_machine_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(DATASET, raising=False)
    wanted = config(tmp_path, data__dataset=str(tmp_path / "nowhere"))
    for rank, local_rank in ((0, 0), (1, 1), (2, 0)):
        with pytest.raises(UserError) as caught:
            dataset_of_rank(wanted, Launch(rank, 4, local_rank, 2), [])
        assert caught.value.reported == (local_rank != 0)

    def ready(_config: RunConfig, say: Any, *, on_one_machine: bool) -> Path:
        say(f"building {on_one_machine}")
        return tmp_path

    monkeypatch.setattr(training_dataset, "ready_dataset", ready)
    for rank, local_rank in ((0, 0), (1, 1)):
        said: list[str] = []
        assert dataset_of_rank(wanted, Launch(rank, 2, local_rank, 2), said) == tmp_path
        assert said == ["building True"]
    assert capsys.readouterr().out == "building True\n"


def test_ranks_take_what_their_launching_process_has_made_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_dataset, "ready_dataset", None)
    monkeypatch.setenv(DATASET, str(tmp_path))
    assert dataset_of_rank(config(tmp_path), Launch(1, 2, 1, 2), []) == tmp_path
    assert given_dataset({}) is None


def test_a_complete_run_needs_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATASET, raising=False)
    monkeypatch.setattr(training_dataset, "ready_dataset", None)
    wanted = config(tmp_path)
    folder.step_folder(wanted.training.folder, wanted.training.steps).mkdir(parents=True)
    assert dataset_of_rank(wanted, Launch(0, 1, 0, 1), []) is None


def test_the_newest_readable_checkpoint_says_what_a_run_was_trained_on(tmp_path: Path) -> None:
    assert trained_on(tmp_path) is None
    for step, content in ((3, {"data": {"fingerprint": "a"}}), (6, {"data": None}), (9, [])):
        place = folder.step_folder(tmp_path, step)
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps(content))
    folder.step_folder(tmp_path, 12).mkdir()
    assert trained_on(tmp_path) == {"fingerprint": "a"}


def test_another_dataset_is_refused_before_anything_is_built(
    built: RunConfig, tmp_path: Path
) -> None:
    place = folder.step_folder(built.training.folder, 2)
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps({"data": {"fingerprint": "f" * 64}}))
    with pytest.raises(UserError, match=r"is not the data that the run was trained on"):
        ready_dataset(built, silent, on_one_machine=True)
    text = tmp_path / "text"
    text.write_text("some words\n" * 100)
    wanted = config(tmp_path, data__text=str(text))
    with pytest.raises(UserError, match=r"not the data that the run was trained on"):
        ready_dataset(wanted, silent, on_one_machine=True)
    assert not list((tmp_path / "cache").glob("*/data.json"))


def test_no_torch_is_imported(built: RunConfig, tmp_path: Path) -> None:
    """The launching process starts its ranks at once."""
    code = (
        "import sys; from pathlib import Path; from keel_megatron.config.load import load_config;"
        "from keel_megatron.training.dataset import ready_dataset;"
        "config = load_config(Path(sys.argv[1]));"
        "ready_dataset(config, print, on_one_machine=True);"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(built))
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
