"""A cache of prepared data that others may write: it is read with care, and runs no code."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keel_megatron
from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import SequenceDataset
from keel_megatron.data.prepare import PreparedData, prepare
from tests.data.reuse import is_reused
from tests.settings import small_config

pytestmark = pytest.mark.security


class Mark:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def cached(prepared: PreparedData, text: Path, tmp_path: Path) -> RunConfig:
    """The prepared data in a cache of this test's own."""
    shutil.copytree(prepared.folder.parent, tmp_path / "cache")
    return small_config(data__text=str(text), data__cache_dir=str(tmp_path / "cache"))


def folder_of(config: RunConfig) -> Path:
    (folder,) = (path for path in config.data.cache_dir.iterdir() if path.is_dir())
    return folder


def ignore(_text: str) -> None:
    pass


def used(config: RunConfig) -> PreparedData:
    """Data as a run uses it."""
    data = prepare(config, ignore)
    for prefix in (data.train_prefix, data.validation_prefix):
        assert len(SequenceDataset(prefix, 32, 1)[0]) == 33
    return data


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"indices/0123456789abcdef-GPTDataset-train-{kind}_index.npy"
            for kind in ("document", "sample", "shuffle")
        ),
        "train.idx",
        "train.bin",
        "data.json",
        "sources.json",
        "tokenizer.model",
    ],
)
def test_a_pickle_in_the_cache_leaves_no_mark(cached: RunConfig, tmp_path: Path, name: str) -> None:
    planted = folder_of(cached) / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_bytes(pickle.dumps(Mark(tmp_path / "mark")))
    used(cached)
    assert not (tmp_path / "mark").exists()


def test_nothing_of_the_package_reads_a_pickle() -> None:
    """Nor does it hand anything to a reader that may."""
    found = []
    for path in Path(keel_megatron.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {
                ast.Import: lambda n: {one.name.split(".")[0] for one in n.names},
                ast.ImportFrom: lambda n: {(n.module or "").split(".")[0]},
                ast.Call: lambda n: {ast.unparse(n.func)},
                ast.keyword: lambda n: {n.arg},
            }.get(type(node), lambda _n: set())(node)
            if names & {
                *("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "allow_pickle"),
                *("torch.load", "torch.jit.load", "np.load", "numpy.load", "pandas.read_pickle"),
            }:
                found.append(f"{path}:{getattr(node, 'lineno', 0)}")
    assert found == []


def no_files(content: dict[str, Any]) -> None:
    content["files"] = {}


def one_file_less(content: dict[str, Any]) -> None:
    del content["files"]["train.bin"]


def a_file_elsewhere(content: dict[str, Any]) -> None:
    content["files"]["../../thesis.txt"] = content["files"]["train.bin"]


def another_text(content: dict[str, Any]) -> None:
    content["corpus"] = "0" * 64


def words_for_numbers(content: dict[str, Any]) -> None:
    content["train_tokens"] = "many"


@pytest.mark.parametrize(
    "change", [no_files, one_file_less, a_file_elsewhere, another_text, words_for_numbers]
)
def test_data_is_reused_only_with_exactly_its_files(
    cached: RunConfig, change: Callable[[dict[str, Any]], None]
) -> None:
    folder = folder_of(cached)
    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(b"\0" * len(whole))
    content = json.loads((folder / "data.json").read_text())
    change(content)
    (folder / "data.json").write_text(json.dumps(content))
    said: list[str] = []
    assert not is_reused(cached, said=said)
    assert "data.json was changed" in said[0]
    assert (folder / "train.bin").read_bytes() == whole


@pytest.mark.parametrize("name", ["train.bin", "data.json", ""])
def test_files_behind_links_are_not_used(cached: RunConfig, tmp_path: Path, name: str) -> None:
    folder = folder_of(cached)
    linked = folder / name if name else folder
    elsewhere = tmp_path / "elsewhere"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    assert not is_reused(cached)
    used(cached)
    assert elsewhere.exists()
    assert not linked.is_symlink()


def test_a_lock_that_is_a_link_is_not_followed(cached: RunConfig, tmp_path: Path) -> None:
    folder, thesis = folder_of(cached), tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    lock = cached.data.cache_dir / f".{folder.name}.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(thesis)
    assert is_reused(cached)
    (folder / "data.json").unlink()
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*\.lock: Too many levels"):
        prepare(cached, ignore)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("at", [10, 18, 26, 34], ids=["version", "lines", "documents", "lengths"])
def test_an_index_that_does_not_fit_is_one_message(cached: RunConfig, at: int) -> None:
    """Even where data.json vouches for it."""
    index = folder_of(cached) / "train.idx"
    content = bytearray(index.read_bytes())
    content[at : at + 8] = b"\xff\xff\xff\x7f" * 2
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.idx is not an index of"):
        SequenceDataset(index.with_suffix(""), 32, 1)


def as_another(do: Callable[[], object]) -> str:
    """What a function returns or raises, as text, in a process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(12345, 12345, 12345)
            os.setresuid(12345, 12345, 12345)
            os.write(writer, str(do()).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_may_use_what_he_cannot_write(cached: RunConfig, text: Path) -> None:
    """Complete data needs no lock; missing data is one message."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(text, f"{place}/text")
        shutil.copytree(cached.data.cache_dir, f"{place}/cache")
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755)
        config = small_config(data__text=f"{place}/text", data__cache_dir=f"{place}/cache")
        assert (
            as_another(lambda: is_reused(config) and used(config).folder.name)
            == folder_of(config).name
        )
        (folder_of(config) / "data.json").unlink()
        said = as_another(lambda: prepare(config, ignore))
        assert said.startswith("UserError: data.cache_dir: cannot write")
        assert "Permission denied" in said
