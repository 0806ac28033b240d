"""Configurations that are part of the package, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.config import load_config
from keel_megatron.config.bundled import FOLDER, bundled_names, locate
from keel_megatron.config.renamed import RENAMED, notices
from keel_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_they_are_those_of_the_repository() -> None:
    wanted = set(ROOT.joinpath("yaml").rglob("*.yaml"))
    wanted -= set(ROOT.joinpath("yaml", "evaluation").iterdir())  # lm-eval's tasks
    assert {FOLDER / f"{name}.yaml" for name in bundled_names()} == wanted
    assert bundled_names()[0] == "demo"


def test_a_name_is_loaded_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "paper/keel_1024"):
        assert load_config(name) == load_config(ROOT / "yaml" / f"{name}.yaml")
    Path("demo").mkdir()  # a folder is no configuration
    assert load_config("demo").model.blocks == 64


def test_a_file_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old = next(iter(RENAMED))
    section, _, key = old.partition(".")
    Path("demo").write_text(f"{section}:\n  {key}: 1\n")
    assert locate(Path("demo")) == Path("demo")
    assert [line.partition(" ")[0] for line in notices(Path("demo"))] == [old]


@pytest.mark.parametrize("name", ["dem", "../yaml/demo", "evaluation/paper"])
def test_other_names_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"`keel config list` shows the bundled|did you mean demo"
    ):
        load_config(name)
