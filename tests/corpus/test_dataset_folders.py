"""Hugging Face datasets on disk, and ready .bin and .idx pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.errors import UserError
from tests.corpus.files import found, indexed, names, saved_dataset, texts


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "d", ["one", "two", "three"])
    (folder / "cache-1234.arrow").write_bytes(b"a cache of map()")
    source = found(folder)
    assert (source.kind, source.skipped) == ("huggingface", ())
    assert names(source) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert list(texts(source.files[0])) == [f"{names(source)[0]}@0", f"{names(source)[0]}@1"]
    assert list(texts(source.files[1]).values()) == ["three"]


def dictionary(folder: Path, splits: list[str]) -> Path:
    for split in splits:
        saved_dataset(folder / split, [split] * 3, parts=1)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


def test_splits_train_and_validation_are_taken(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "d", ["test", "train", "validation"])
    said: list[str] = []
    source = found(folder, said=said)
    assert [(file.name, file.part) for file in source.files] == [
        ("train/data-00000-of-00001.arrow", "both"),
        ("validation/data-00000-of-00001.arrow", "validation"),
    ]
    message = f"data.text: {folder}: using train and validation of the splits test, train, valid"
    assert said[0].startswith(message)
    assert [(s.reason, s.count) for s in source.skipped] == [("of a split that is not used", 1)]


def test_validation_of_another_dataset(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "d", ["train", "validation"])
    other = saved_dataset(tmp_path / "other", ["x"], parts=1)
    said: list[str] = []
    source = found(folder, validation=str(other), said=said)
    assert [file.location.split("/")[-2] for file in source.files] == ["train", "other"]
    assert said[0] == f"data.sources.0: {folder}: using train of the splits train, validation"
    second = dictionary(tmp_path / "second", ["train", "validation"])
    source = found(other, validation=str(second))
    places = [(file.location.split("/")[-2], file.part) for file in source.files]
    assert places == [("other", "both"), ("validation", "validation")]


def test_a_dictionary_without_a_training_split(tmp_path: Path) -> None:
    folder = dictionary(tmp_path / "d", ["test", "dev"])
    with pytest.raises(UserError, match=r"has no split `train` \(its splits: test, dev\); give"):
        found(folder)
    assert len(found(folder / "dev").files) == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "state.json is damaged"),
        ("[]", "has no list '_data_files'"),
        ({"_data_files": [{"filename": "../../etc/passwd"}]}, "is not a file name"),
        ({"_data_files": [{"filename": "no.arrow"}]}, "no.arrow: No such file"),
        ({"_data_files": [3]}, "None is not a file name"),
        ({"_data_files": [], "_indices_data_files": [{}]}, r"flatten_indices\(\)"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    folder = saved_dataset(tmp_path / "d", ["one"])
    text = state if isinstance(state, str) else json.dumps(state)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match=rf"^data.text: .*{message}"):
        found(folder)


def test_a_link_to_a_device_is_no_description(tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "d", ["one"])
    (folder / "dataset_dict.json").mkdir()
    assert len(found(folder).files) == 2
    (folder / "state.json").write_text(" " * (1 << 21))
    with pytest.raises(UserError, match=r"state.json cannot be read: has more than"):
        found(folder)


def test_a_folder_of_pairs(tmp_path: Path) -> None:
    prefixes = (indexed(tmp_path / "a_text"), indexed(tmp_path / "b_text"))
    (tmp_path / "c.bin").write_bytes(b"\0 no pair")
    (tmp_path / "d.idx").write_bytes(b"MMIDIDX\0\0 no pair")
    source = found(tmp_path, format="megatron")
    assert (source.kind, source.prefixes) == ("megatron", prefixes)
    assert {Path(s.first).name for s in source.skipped} == {"c.bin", "d.idx"}


@pytest.mark.parametrize("given", ["a", "a.bin", "a.idx", "a*", "?.bin"])
def test_a_pair_by_any_of_its_names(tmp_path: Path, given: str) -> None:
    prefix = indexed(tmp_path / "a")
    assert found(tmp_path / given).prefixes == (prefix,)


def test_a_pair_that_is_none(tmp_path: Path) -> None:
    prefix = indexed(tmp_path / "a")
    Path(f"{prefix}.idx").write_bytes(b"IIDXMM")
    with pytest.raises(UserError, match=r"data.sources.0: .*/a is not a prefix of a .bin and"):
        found(prefix, format="megatron")
    with pytest.raises(UserError, match=r"data.text: .*/a.bin is not text"):
        found(Path(f"{prefix}.bin"))
