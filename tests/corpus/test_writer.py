"""The .bin and .idx files equal Megatron-core's to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from keel_megatron.corpus import writer
from keel_megatron.corpus.writer import TokenWriter, join, token_type, write_index


@pytest.mark.parametrize("vocab_size", [512, 65_499, 65_500, 128_000])
def test_files_equal_those_of_megatron(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    numbers = np.random.default_rng(0)
    documents = [numbers.integers(0, vocab_size, n) for n in (1, 7, 300_000, 2, 1)]
    dtype = DType.optimal_dtype(vocab_size)
    assert token_type(vocab_size) == dtype
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with TokenWriter(tmp_path / "ours.bin", vocab_size) as ours:
        for document in documents:
            builder.add_document(document, [len(document)])
            ours.begin_document(counted=True)
            ours.add(document[:3])
            ours.add(document[3:])
            ours.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_index(tmp_path / "ours.idx", np.array(ours.lengths, np.int32), token_type(vocab_size))
    for end in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{end}").read_bytes()
        assert (tmp_path / f"ours.{end}").read_bytes() == theirs
    counts = np.bincount(np.concatenate(documents), minlength=vocab_size)
    np.testing.assert_array_equal(ours.counts, counts)


def test_only_tokens_of_counted_documents_are_counted(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a.bin", 8) as file:
        for counted, tokens in ((True, [1, 2]), (False, [3, 3]), (True, [1])):
            file.begin_document(counted=counted)
            file.add(np.array(tokens))
            file.end_document()
    assert file.counts.tolist() == [0, 2, 1, 0, 0, 0, 0, 0]
    assert np.fromfile(tmp_path / "a.bin", np.uint16).tolist() == [1, 2, 3, 3, 1]


def test_a_document_longer_than_the_index_can_say_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LONGEST", 4)
    with TokenWriter(tmp_path / "a.bin", 8) as file:
        file.add(np.arange(7))
        file.add(np.array([7]))
        file.end_document()
    assert list(file.lengths) == [4, 4]


def test_joined_files(tmp_path: Path) -> None:
    import hashlib

    for name, content in (("a", b"12"), ("b", b""), ("c", b"345")):
        (tmp_path / name).write_bytes(content)
    digest = join([tmp_path / name for name in "abc"], tmp_path / "all")
    assert (tmp_path / "all").read_bytes() == b"12345"
    assert digest == hashlib.sha256(b"12345").hexdigest()
