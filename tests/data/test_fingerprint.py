"""A run goes on with the data that it was trained on, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.prepare import PreparedData, prepare
from tests.data.reuse import is_reused
from tests.settings import small_config


def ignore(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(
    text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, PreparedData, Path]:
    """Prepared data, and a copy of its text that a test may change."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(text, home / "text")
    config = small_config(data__text=str(home / "text"), data__cache_dir=str(home / "cache"))
    return config, prepare(config, ignore), home / "text"


def test_the_same_data_is_taken_wherever_its_text_lies(
    made: tuple[RunConfig, PreparedData, Path], tmp_path: Path
) -> None:
    config, data, text = made
    assert set(data.identity()["files"]) >= {"tokenizer.model", "train.bin", "train.idx"}
    assert is_reused(config, data.identity())
    shutil.copytree(text, tmp_path / "elsewhere")
    moved = small_config(
        data__text=str(tmp_path / "elsewhere"), data__cache_dir=str(data.folder.parent)
    )
    assert is_reused(moved, data.identity())


@pytest.mark.parametrize("change", ["changed", "shrunk", "missing", "new"])
def test_other_text_is_refused_by_name_before_it_is_prepared(
    made: tuple[RunConfig, PreparedData, Path], tmp_path: Path, change: str
) -> None:
    _config, data, text = made
    other = tmp_path / "text"
    shutil.copytree(text, other)
    victim = other / "ast.py"
    size = victim.stat().st_size
    if change == "changed":
        victim.write_text(victim.read_text().replace("import", "imbort", 1))
        expected = rf"ast\.py changed \({size} bytes then, {size} now\)"
    elif change == "shrunk":
        victim.write_text(victim.read_text()[:-100])
        expected = rf"ast\.py changed \({size} bytes then, {size - 100} now\)"
    elif change == "missing":
        victim.unlink()
        expected = r"ast\.py is missing"
    else:
        (other / "more.py").write_text("x = 1\n")
        expected = r"more\.py is new"
    changed = small_config(data__text=str(other), data__cache_dir=str(data.folder.parent))
    with pytest.raises(UserError, match=rf"data\.text: not the data .*: {expected}\. A run"):
        prepare(changed, ignore, data.identity())
    assert [path.name for path in data.folder.parent.iterdir() if path.is_dir()] == [
        data.folder.name
    ]


def test_without_the_old_data_the_hashes_are_shown(
    made: tuple[RunConfig, PreparedData, Path], tmp_path: Path
) -> None:
    _config, data, _text = made
    (tmp_path / "other.txt").write_text("another text\n" * 100)
    changed = small_config(
        data__text=str(tmp_path / "other.txt"), data__cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(UserError, match=rf"SHA-256 {data.corpus[:12]} then, [0-9a-f]{{12}} now"):
        prepare(changed, ignore, data.identity())


def test_text_that_vanished_is_named(
    made: tuple[RunConfig, PreparedData, Path], tmp_path: Path
) -> None:
    _config, data, _text = made
    gone = small_config(data__text=str(tmp_path / "gone"), data__cache_dir=str(data.folder.parent))
    with pytest.raises(UserError, match=r"data\.text: .*gone does not exist"):
        prepare(gone, ignore, data.identity())


def test_another_tokenizer_is_refused(
    made: tuple[RunConfig, PreparedData, Path], tmp_path: Path
) -> None:
    _config, data, text = made
    given = small_config(
        data__text=str(text),
        data__cache_dir=str(data.folder.parent),
        data__tokenizer=str(data.tokenizer_path),
    )
    with pytest.raises(UserError, match=r"data\.tokenizer: not the .*\(none was given then, S"):
        prepare(given, ignore, data.identity())


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.bin", "tokenizer.model"])
def test_a_changed_bit_of_the_prepared_data_is_mended(
    made: tuple[RunConfig, PreparedData, Path], name: str
) -> None:
    """The text is the same, so preparing it anew gives the same bytes, or a refusal."""
    config, data, _text = made
    path = data.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said: list[str] = []
    assert not is_reused(config, data.identity(), said)
    assert f"{name} is missing or was changed" in said[0]
    assert path.read_bytes() == whole


def test_the_same_bytes_at_another_time_are_the_same(
    made: tuple[RunConfig, PreparedData, Path],
) -> None:
    config, data, _text = made
    os.utime(data.folder / "train.bin", (1, 1))
    assert is_reused(config, data.identity())


def test_prepared_data_that_came_out_otherwise_is_refused(
    made: tuple[RunConfig, PreparedData, Path],
) -> None:
    config, data, _text = made
    expected = data.identity()
    expected["files"]["train.bin"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match=r"train\.bin is not what the run was trained on: .*000"):
        prepare(config, ignore, expected)
