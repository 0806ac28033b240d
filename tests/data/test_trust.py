"""A cache of datasets that others may write: it is read with care, and runs no code."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import keel_megatron
from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import Dataset, open_dataset
from keel_megatron.data.index_files import open_sequences
from keel_megatron.training.dataset import ready_dataset
from tests.datasets import record
from tests.settings import small_config

pytestmark = pytest.mark.security


class Mark:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def built(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a dataset of the text, and its index files."""
    cache = tmp_path_factory.mktemp("cache")
    ready(small_config(data__text=str(text), data__cache_dir=str(cache)))
    return cache


@pytest.fixture
def cached(built: Path, text: Path, tmp_path: Path) -> RunConfig:
    """A copy in a cache of this test's own."""
    shutil.copytree(built, tmp_path / "cache")
    return small_config(data__text=str(text), data__cache_dir=str(tmp_path / "cache"))


def folder_of(config: RunConfig) -> Path:
    (manifest,) = config.data.cache_dir.glob("*/data.json")
    return manifest.parent


def ready(config: RunConfig, said: list[str] | None = None) -> Path:
    lines: list[str] = [] if said is None else said
    return ready_dataset(config, lines.append, on_one_machine=True)


def used(config: RunConfig) -> Dataset:
    """Data as a run uses it."""
    data = open_dataset(ready(config), config.data)
    for part in ("train", "validation"):
        cache = config.data.cache_dir
        sequences = open_sequences(data, data.sources[0], part, 32, 1, cache)  # type: ignore[arg-type]
        assert len(sequences.read(0).tokens) == 33  # type: ignore[arg-type]
    return data


def planted(config: RunConfig) -> list[Path]:
    """Every file that a run reads of its data."""
    found = [path for path in config.data.cache_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in found} >= {".json", ".bin", ".idx", ".npy", ".model"}
    return found


def test_a_pickle_in_the_cache_leaves_no_mark(cached: RunConfig, tmp_path: Path) -> None:
    for path in planted(cached):
        whole = path.read_bytes()
        state = path.stat()
        path.write_bytes(pickle.dumps(Mark(tmp_path / "mark")))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        with suppress(UserError):
            used(cached)
        assert not (tmp_path / "mark").exists(), path
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    used(cached)


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


def change(config: RunConfig, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder_of(config) / "data.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def shard(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["sources"][0]["shards"][0]
    return found


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda content: content.pop("sources"), "sources: Field required"),
        (lambda content: content.update(sources=[]), "sources: Tuple should have at least 1 item"),
        (lambda content: shard(content).update(name="../../thesis"), "name: String should match"),
        (lambda content: shard(content)["files"].pop("idx"), "has no files"),
        (lambda content: shard(content).update(tokens="many"), "tokens: Input should be a valid"),
        (lambda content: shard(content).update(files={"txt": {}}), "Input should be 'bin', 'idx'"),
        (lambda content: content["tokenizer"].update(file="/etc/passwd"), "tokenizer.file: Input"),
        (lambda content: content["sources"].append(content["sources"][0]), "a name twice"),
        (lambda content: content.update(format=4), "has format 4; this version reads 3"),
        (lambda content: content.update(unigram_entropy=float("nan")), "unigram_entropy: "),
        (lambda content: shard(content).update(external=True), "uses .* in place, not in"),
    ],
)
def test_what_data_json_says_is_checked(
    cached: RunConfig, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    change(cached, edit)
    folder = folder_of(cached)
    direct = cached.data.model_copy(update={"dataset": folder})
    with pytest.raises(UserError, match=rf"^data\.(dataset|sources): .*{said}"):
        open_dataset(folder, direct)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"[" * 100_000, b'{"format": 3}', b"\xff"]
)
def test_a_data_json_that_is_none(cached: RunConfig, content: bytes) -> None:
    folder = folder_of(cached)
    (folder / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.dataset: .*data\.json"):
        open_dataset(folder, cached.data)


@pytest.mark.parametrize(
    "name", ["shards", "data.json", "tokenizer.model", "*.bin", "*.idx", "*.npy"]
)
def test_files_behind_links_are_not_used(cached: RunConfig, tmp_path: Path, name: str) -> None:
    folder = folder_of(cached)
    linked = next(folder.rglob(name))
    elsewhere = tmp_path / "elsewhere"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"is a link, which is not followed"):
        open_dataset(folder, cached.data)


@pytest.mark.parametrize("name", ["data.json", "tokenizer.model", "*.bin", "*.idx", "*.npy"])
def test_a_fifo_is_not_waited_for(cached: RunConfig, name: str) -> None:
    path = next(folder_of(cached).rglob(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError):
        open_dataset(folder_of(cached), cached.data)


@pytest.mark.parametrize("at", [10, 18, 26, 34], ids=["version", "lines", "documents", "lengths"])
def test_an_index_that_does_not_fit_is_one_message(cached: RunConfig, at: int) -> None:
    """Even where data.json vouches for it."""
    index = next(folder_of(cached).rglob("*.idx"))
    content = bytearray(index.read_bytes())
    content[at : at + 8] = b"\xff\xff\xff\x7f" * 2
    index.write_bytes(content)
    change(cached, lambda content: shard(content)["files"].update(idx=record(index)))
    shutil.rmtree(cached.data.cache_dir / "index")
    with pytest.raises(UserError, match=r"\.idx is not an index of"):
        ready(cached)


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
    """A complete dataset and its index files need no lock; a missing one is one message."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(text, f"{place}/text")
        shutil.copytree(cached.data.cache_dir, f"{place}/cache")
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755)
        config = small_config(data__text=f"{place}/text", data__cache_dir=f"{place}/cache")
        assert as_another(lambda: used(config).folder.name) == folder_of(config).name
        shutil.rmtree(config.data.cache_dir / "index")
        assert as_another(lambda: used(config).folder.name) == folder_of(config).name
        (folder_of(config) / "data.json").unlink()
        said = as_another(lambda: ready(config))
        assert said.startswith("UserError: data.cache_dir: cannot write")
        assert "Permission denied" in said
