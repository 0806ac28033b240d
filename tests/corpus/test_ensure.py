"""A run's dataset is found, or built by one process while the others wait."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config.data import DataConfig, SourceConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.corpus import ensure
from keel_megatron.corpus.ensure import build_dataset, ensure_dataset, local, locked
from keel_megatron.data.manifest import MANIFEST, Manifest
from keel_megatron.errors import UserError
from tests.corpus.datasets import write_texts
from tests.corpus.files import ignore
from tests.corpus.tokenizers import write_sentencepiece
from tests.locks import without_locks
from tests.settings import small_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_config(
        data__text=str(write_texts(tmp_path / "text", 5)),
        data__tokenizer=str(write_sentencepiece(tmp_path)),
        data__vocab_size=400,
        data__cache_dir=str(tmp_path / "cache"),
    )


def test_it_is_built_once_and_files_are_hashed_once(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_dataset(config, ignore, may_build=True)
    assert folder.parent == config.data.cache_dir
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    assert folder.name == manifest.fingerprint[:16]

    def fail(*_args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(ensure, "build", fail)
    monkeypatch.setattr("keel_megatron.corpus.contents.hash_files", fail)
    said: list[str] = []
    expected = manifest.identity()
    assert ensure_dataset(config, said.append, expected, may_build=False) == folder
    assert said == [f"using the dataset in {folder}"]


def test_the_fingerprint_is_of_content(config: RunConfig, tmp_path: Path) -> None:
    folder = ensure_dataset(config, ignore, may_build=True)
    moved = tmp_path / "moved"
    (tmp_path / "text").rename(moved)
    update = {"text": (moved,), "seq_length": 16, "cache_dir": tmp_path / "other"}
    again = config.model_copy(update={"data": config.data.model_copy(update=update)})
    assert ensure_dataset(again, ignore, may_build=True).name == folder.name
    (moved / "00.txt").write_text("changed")
    assert ensure_dataset(again, ignore, may_build=True).name != folder.name


def test_others_wait_for_the_one_that_builds(config: RunConfig) -> None:
    said: list[str] = []
    results: list[Path] = []

    def run() -> None:
        results.append(ensure_dataset(config, said.append, may_build=True))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert sum(line.startswith("tokenizing with") for line in said) == 1


def test_who_waits_says_so(config: RunConfig, tmp_path: Path) -> None:
    said: list[str] = []
    with locked(tmp_path / "d", ignore):
        thread = threading.Thread(target=lambda: locked(tmp_path / "d", said.append).__enter__())
        thread.start()
        while not said:
            pass
    thread.join()
    assert said == [f"waiting for another process that builds {tmp_path / 'd'}"]


@pytest.mark.parametrize(("build", "may_build"), [("never", True), ("auto", False)])
def test_it_is_refused_where_it_may_not_be_built(
    config: RunConfig, build: str, may_build: bool
) -> None:
    never = config.model_copy(update={"data": config.data.model_copy(update={"build": build})})
    why = "data.build is never" if build == "never" else "keel train builds on one machine only"
    with pytest.raises(UserError, match=rf"{why}; build it first: keel data build CONFIG"):
        ensure_dataset(never, ignore, may_build=may_build)


def test_other_data_is_refused_before_it_is_built(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_dataset(config, ignore, may_build=True)
    expected = Manifest.model_validate_json((folder / MANIFEST).read_text()).identity()
    (tmp_path / "text" / "01.txt").write_text("changed")
    (tmp_path / "text" / "02.txt").rename(tmp_path / "text" / "new.txt")
    monkeypatch.setattr(ensure, "build", None)
    with pytest.raises(
        UserError,
        match=r"01.txt changed \(437 bytes then, 7 now\), 02.txt is missing, new.txt is new. A run",
    ):
        ensure_dataset(config, ignore, expected, may_build=True)
    with pytest.raises(UserError, match=r"fingerprint 0+ then"):
        ensure_dataset(config, ignore, {"fingerprint": "0" * 64}, may_build=True)


def test_a_given_dataset_folder(config: RunConfig, tmp_path: Path) -> None:
    folder = ensure_dataset(config, ignore, may_build=True)
    data = config.data.model_copy(update={"dataset": folder, "text": None})
    given = config.model_copy(update={"data": data})
    assert ensure_dataset(given, ignore, may_build=False) == folder
    (folder / MANIFEST).unlink()
    sources = (SourceConfig(path=config.data.text or ()),)
    given = given.model_copy(update={"data": data.model_copy(update={"sources": sources})})
    with pytest.raises(UserError, match=r"not a dataset folder; build it with keel data build"):
        ensure_dataset(given, ignore, may_build=False)


def test_a_dataset_is_never_built_over_other_files(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match=r"exists and is not the dataset of these sources"):
        build_dataset(config.data, ignore, tmp_path / "out", local(1))
    out = build_dataset(config.data, ignore, tmp_path / "new", local(1))
    said: list[str] = []
    assert build_dataset(config.data, said.append, out, local(1)) == out
    assert said == [f"the dataset is in {out}"]


def test_a_cache_that_cannot_be_written(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write .*cache"):
        ensure_dataset(config, ignore, may_build=True)
    with pytest.raises(UserError, match=r"^--out: cannot write .*cache"):
        build_dataset(config.data, ignore, tmp_path / "cache" / "set", local(1))


def named(config: RunConfig, **settings: Any) -> RunConfig:
    """The run with other settings of `data`, and without a text."""
    data = {**config.data.model_dump(exclude_none=True), "text": None, **settings}
    return config.model_copy(update={"data": DataConfig.model_validate(data)})


def test_a_mistyped_dataset_is_not_built_from_the_standard_library(
    config: RunConfig, tmp_path: Path
) -> None:
    out = tmp_path / "mistyped"
    mistyped = named(config, dataset=str(out))
    why = r"mistyped does not exist, and data.text or data.sources do not say what to build it"
    with pytest.raises(UserError, match=why):
        ensure_dataset(mistyped, ignore, may_build=True)
    for place in (None, tmp_path / "other"):
        with pytest.raises(UserError, match=why):
            build_dataset(mistyped.data, ignore, place, local(1))
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match=r"mistyped is not a dataset folder, and data.text or"):
        ensure_dataset(mistyped, ignore, may_build=True)


def test_a_dataset_that_is_there_is_shown(config: RunConfig) -> None:
    folder = ensure_dataset(config, ignore, may_build=True)
    said: list[str] = []
    given = named(config, dataset=str(folder)).data
    assert build_dataset(given, said.append, None, local(1)) == folder
    assert said == [f"the dataset is in {folder}"]


@pytest.mark.parametrize(
    ("entry", "named_as"), [({"weight": 1.0}, "the entry"), ({"name": "web"}, "web")]
)
def test_a_source_without_a_path_is_named(
    config: RunConfig, tmp_path: Path, entry: dict[str, Any], named_as: str
) -> None:
    first = {"path": str(tmp_path / "text")} | ({"weight": 1.0} if "weight" in entry else {})
    given = named(config, dataset=str(tmp_path / "d"), sources=[first, entry])
    why = rf"^data.sources.1: {named_as} has no path, and data.dataset .*/d does not exist"
    with pytest.raises(UserError, match=why):
        build_dataset(given.data, ignore, None, local(1))
    with pytest.raises(UserError, match=why):
        ensure_dataset(given, ignore, may_build=True)


def test_a_file_system_without_locks(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, tmp_path)
    said: list[str] = []
    folder = ensure_dataset(config, said.append, may_build=True)
    assert (folder / MANIFEST).is_file()
    assert [line for line in said if "locks" in line] == [
        f"{config.data.cache_dir} is on a file system without locks; build {folder} on one "
        "machine only"
    ]


@pytest.mark.parametrize(
    ("file", "number", "why"),
    [
        ("text/a.txt", errno.EIO, r"^data: .*text/a.txt: Input/output error"),
        ("d.partial/plan.json", errno.EACCES, r"^--out: cannot write .*plan.json: Permission"),
        (None, errno.ENOSPC, r"^--out: cannot write .*d.partial: No space left"),
        (None, errno.EIO, r"^--out: cannot build .*d.partial: Input/output error"),
    ],
)
def test_the_file_of_an_error_is_named(
    tmp_path: Path, file: str | None, number: int, why: str
) -> None:
    error = OSError(number, os.strerror(number), *([str(tmp_path / file)] if file else []))
    with pytest.raises(UserError, match=why), locked(tmp_path / "d", ignore, "--out"):
        raise error
