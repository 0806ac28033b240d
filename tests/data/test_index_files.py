"""Index files: made once, complete or absent, and made again when they are damaged."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keel_megatron.data import index_files
from keel_megatron.data.dataset import Dataset, open_dataset
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.sequences import SequenceDataset
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.locks import without_locks
from tests.settings import small_config

CONFIG = small_config(data__vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "set"
    return open_dataset(write_dataset(folder, {"web": [made_up(60, 0)]}), CONFIG.data)


def opened(
    data: Dataset, cache: Path, said: list[str] | None = None, check: bool = True
) -> SequenceDataset:
    say = [] if said is None else said
    return open_sequences(data, data.sources[0], "train", 32, 1, cache, say.append, check=check)


def rows(dataset: SequenceDataset) -> list[list[int]]:
    return [dataset.read(n).tokens.tolist() for n in range(len(dataset))]  # type: ignore[union-attr]


def folder_in(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "index").iterdir() if path.is_dir())
    return folder


def test_a_second_time_they_are_mapped(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rows(opened(data, tmp_path))
    monkeypatch.setattr(index_files, "build_index", None)
    again = opened(data, tmp_path)
    assert rows(again) == first
    assert isinstance(again._index.ends, np.memmap)


def cut(folder: Path) -> None:
    with (folder / "order.npy").open("r+b") as file:
        file.truncate(100)


def emptied(folder: Path) -> None:
    (folder / "ends.npy").write_bytes(b"")


def gone(folder: Path) -> None:
    (folder / "documents.npy").unlink()


def changed(folder: Path) -> None:
    content = bytearray((folder / "order.npy").read_bytes())
    content[-1] ^= 1
    (folder / "order.npy").write_bytes(content)


def half_written(folder: Path) -> None:
    (folder / "index.json").write_text('{"version": 1, "fi')


def of_objects(folder: Path) -> None:
    np.save(folder / "order.npy", np.array([{}], dtype=object), allow_pickle=True)
    record = json.loads((folder / "index.json").read_text())
    path = folder / "order.npy"
    record["files"]["order.npy"] = {
        "bytes": path.stat().st_size,
        "crc32": index_files._checksum(path),
    }
    (folder / "index.json").write_text(json.dumps(record))


def linked(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize("damage", [cut, emptied, gone, changed, half_written, of_objects, linked])
def test_damaged_ones_are_made_again(
    data: Dataset, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    first = rows(opened(data, tmp_path))
    folder = folder_in(tmp_path)
    damage(folder)
    said: list[str] = []
    assert rows(opened(data, tmp_path, said)) == first
    assert folder.is_dir()
    assert not folder.is_symlink()
    if damage is not linked:
        assert said == [f"{folder} is damaged: making it again"]
    said.clear()
    opened(data, tmp_path, said)
    assert said == []


def test_another_length_seed_or_dataset_has_others(data: Dataset, tmp_path: Path) -> None:
    source = data.sources[0]
    for part, length, seed in (
        ("train", 32, 1),
        ("validation", 32, 1),
        ("train", 16, 1),
        ("train", 32, 2),
    ):
        open_sequences(data, source, part, length, seed, tmp_path)  # type: ignore[arg-type]
    other = write_dataset(tmp_path / "set", {"web": [made_up(60, 5)]})
    opened(open_dataset(other, CONFIG.data), tmp_path)
    assert sum(path.is_dir() for path in (tmp_path / "index").iterdir()) == 5


def test_a_copied_dataset_has_the_same_ones(data: Dataset, tmp_path: Path) -> None:
    opened(data, tmp_path / "cache")
    shutil.copytree(data.folder, tmp_path / "copy")
    opened(open_dataset(tmp_path / "copy", CONFIG.data), tmp_path / "cache")
    assert folder_in(tmp_path / "cache")


def test_where_nothing_can_be_written_they_are_in_memory(data: Dataset, tmp_path: Path) -> None:
    expected = rows(opened(data, tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    said: list[str] = []
    assert rows(opened(data, tmp_path / "file" / "cache", said)) == expected
    assert said[0].startswith("data.cache_dir: cannot write")
    assert "every process computes the order" in said[0]


def test_a_full_disk_leaves_nothing_half_written(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, _index: object) -> None:
        (folder / "ends.npy").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder / "ends.npy"))

    with monkeypatch.context() as patch:
        patch.setattr(index_files, "_write", full)
        said: list[str] = []
        first = rows(opened(data, tmp_path, said))
        assert "No space left on device" in said[0]
        assert not any(path.is_dir() for path in (tmp_path / "index").iterdir())
    assert rows(opened(data, tmp_path)) == first
    assert folder_in(tmp_path)


def test_one_process_makes_them_and_others_wait(data: Dataset, tmp_path: Path) -> None:
    first = rows(opened(data, tmp_path))
    folder = folder_in(tmp_path)
    shutil.rmtree(folder)
    said: list[str] = []
    found: list[SequenceDataset] = []
    with (tmp_path / "index" / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(opened(data, tmp_path, said)))
        waiting.start()
        while not said:
            time.sleep(0.01)
        assert said == [f"waiting for another process that makes {folder}"]
        assert not folder.exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join()
    assert rows(found[0]) == first


@pytest.mark.security
def test_a_lock_that_is_a_link_is_not_followed(data: Dataset, tmp_path: Path) -> None:
    opened(data, tmp_path)
    folder = folder_in(tmp_path)
    shutil.rmtree(folder)
    thesis = tmp_path / "thesis"
    thesis.write_text("years of work")
    lock = folder.with_name(f".{folder.name}.lock")
    lock.unlink()
    os.symlink(thesis, lock)
    said: list[str] = []
    opened(data, tmp_path, said)
    assert "cannot write" in said[0]
    assert thesis.read_text() == "years of work"


def test_without_locks_they_are_in_memory(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(opened(data, tmp_path / "with"))
    without_locks(monkeypatch, tmp_path)
    said: list[str] = []
    assert rows(opened(data, tmp_path / "without", said)) == expected
    assert "No locks available; every process computes the order" in said[0]
