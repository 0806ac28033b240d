"""Opening a dataset folder: what it says is checked, and its place does not matter."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import Dataset, check_lengths, open_dataset
from keel_megatron.data.file_checks import check_files
from keel_megatron.data.identity import refuse_other
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.locks import without_locks
from tests.settings import small_config

SOURCES = {"web": [made_up(60, 0), made_up(20, 1)], "books": [made_up(30, 2)]}


def config(**overrides: Any) -> RunConfig:
    return small_config(**{"data__vocab_size": VOCABULARY, **overrides})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", SOURCES, weights={"web": 7, "books": 3})


def opened(folder: Path, **overrides: Any) -> Dataset:
    return open_dataset(folder, config(**overrides).data)


def test_weights_are_those_of_the_build_or_of_the_configuration(folder: Path) -> None:
    assert opened(folder).quotas == {"web": 700, "books": 300}
    by_name = [{"name": "books", "weight": 1.0}, {"name": "web", "weight": 1.0}]
    data = opened(folder, data__dataset=str(folder), data__sources=by_name)
    assert data.quotas == {"web": 500, "books": 500}
    by_position = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 3.0}]
    assert opened(folder, data__sources=by_position).quotas == {"web": 250, "books": 750}
    by_size = opened(
        folder, data__dataset=str(folder), data__sources=[{"name": "books"}, {"name": "web"}]
    )
    tokens = by_size.tokens("train")
    for source in by_size.sources:
        share = source.record.tokens("train") / tokens
        assert by_size.quotas[source.name] == pytest.approx(1000 * share, abs=1)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{"name": "web"}], r"also has books; give every source an entry"),
        ([{"name": "news"}, {"name": "web"}], r"sources\.0: .* has no source news; .* web, books"),
        ([{}], r"sources\.0: .* has no source without name; name one of web, books"),
    ],
)
def test_entries_that_do_not_fit_the_dataset(
    folder: Path, sources: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(UserError, match=rf"^data\.{said}|^data\.sources: .*{said}"):
        opened(folder, data__dataset=str(folder), data__sources=sources)


def test_the_vocabulary_must_be_the_models(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.vocab_size: 640 must be 320, .* the dataset"):
        opened(folder, data__vocab_size=640)


def test_a_source_without_a_sequence_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.sources: books: the validation set has \d+ tok"):
        check_lengths(opened(folder), 200)
    alone = write_dataset(folder.parent / "alone", {"text": [made_up(2, 0)]})
    with pytest.raises(
        UserError, match=r"^data\.text: .* use more data, a shorter data\.seq_l\w+$"
    ):
        check_lengths(opened(alone), 200)


def test_a_copied_folder_is_the_same_dataset_and_is_read_once(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "else" / "where", copy_function=shutil.copy)
    copy = opened(tmp_path / "else" / "where")
    refuse_other(opened(folder).identity(), copy)
    before = reads(copy, tmp_path / "cache")
    assert len(before) == 9
    assert reads(copy, tmp_path / "cache") == []
    assert reads(opened(folder), tmp_path / "cache") == []  # has the times of its records


def reads(data: Dataset, cache: Path) -> list[str]:
    """The files that a check reads."""
    from keel_megatron.data import file_checks

    found = []
    with pytest.MonkeyPatch.context() as patch:
        whole = file_checks.sha256

        def sha256(path: Path) -> str:
            found.append(path.name)
            return whole(path)

        patch.setattr(file_checks, "sha256", sha256)
        check_files(data, cache, lambda _text: None)
    return found


def test_a_changed_file_is_found_by_its_time(folder: Path, tmp_path: Path) -> None:
    path = folder / "shards" / "web-00001.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    for _ in range(2):  # nothing is noted
        with pytest.raises(UserError, match=r"web-00001\.bin was changed since the dataset was b"):
            check_files(opened(folder), tmp_path / "cache", lambda _text: None)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "data.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_another_dataset_is_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    before = opened(folder).identity()
    assert "web/web-00000.bin" in before["shards"]
    refuse_other({}, opened(folder))  # of random tokens
    weights = [{"name": "web", "weight": 1.0}, {"name": "books", "weight": 1.0}]
    with pytest.raises(UserError, match=r"web 700, books 300 then, .* training\.initialize_from"):
        refuse_other(before, opened(folder, data__dataset="d", data__sources=weights))
    other = write_dataset(tmp_path / "other", {**SOURCES, "books": [made_up(30, 9)]})
    with pytest.raises(UserError, match=r"^data\.dataset: .*other is not the data .*_from"):
        refuse_other(before, opened(other))
    changed(other, lambda content: content.update(fingerprint=before["fingerprint"]))
    with pytest.raises(UserError, match=r"books/books-00000\.bin of .*other is not what the run"):
        refuse_other(before, opened(other))
    changed(folder, lambda content: content["tokenizer"].update(sha256="1" * 64))
    with pytest.raises(UserError, match=r"^data\.tokenizer: the tokenizer of .* is not the run's"):
        refuse_other(before, opened(folder))


def external(tmp_path: Path, **where: Path) -> Path:
    return write_dataset(
        tmp_path / "set",
        SOURCES | {"ready": [made_up(40, 3)]},
        weights={"web": 1, "books": 1, "ready": 1},
        external=where,
    )


def entries(path: Path) -> list[dict[str, Any]]:
    return [
        {"name": "web", "weight": 1.0},
        {"name": "books", "weight": 1.0},
        {"name": "ready", "weight": 1.0, "path": str(path)},
    ]


@pytest.mark.parametrize("given", ["tokens", "tokens.bin", "tokens.idx", "", "*.bin", "**/tok*"])
def test_tokens_used_in_place_are_found_where_the_configuration_says(
    tmp_path: Path, given: str
) -> None:
    folder = external(tmp_path, ready=tmp_path / "mine" / "tokens")
    shutil.copy(tmp_path / "mine" / "tokens.bin", tmp_path / "mine" / "other.bin")
    data = opened(
        folder, data__dataset=str(folder), data__sources=entries(tmp_path / "mine" / given)
    )
    assert data.sources[2].shards[0].prefix == tmp_path / "mine" / "tokens"
    assert {path.parent.name for path in data.sources[2].shards[0].files} == {"mine", "shards"}


def test_tokens_used_in_place_that_are_not_there(tmp_path: Path) -> None:
    folder = external(tmp_path, ready=tmp_path / "mine" / "tokens")
    with pytest.raises(
        UserError, match=r"uses tokens\.bin and \.idx of source ready in place, and"
    ):
        opened(folder)
    nowhere = entries(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"in place, not in .*nowhere; give their path in an entry"):
        opened(folder, data__dataset=str(folder), data__sources=nowhere)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.dataset: .*nowhere does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"is not a dataset: it has no data\.json; build one: keel d"
    ):
        opened(tmp_path)


def test_copied_files_are_checked_without_locks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, tmp_path)
    os.utime(folder / "shards" / "web-00001.bin", ns=(0, 0))
    assert reads(opened(folder), tmp_path / "cache") == ["web-00001.bin"]
    assert reads(opened(folder), tmp_path / "cache") == []


def test_a_file_that_cannot_be_read_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.utime(folder / "shards" / "web-00001.bin", ns=(0, 0))
    monkeypatch.setattr("keel_megatron.data.file_checks.sha256", broken)
    with pytest.raises(UserError, match=r"web-00001\.bin cannot be read: Input/output error"):
        check_files(opened(folder), tmp_path / "cache", lambda _text: None)
