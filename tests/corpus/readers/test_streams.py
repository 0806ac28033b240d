"""Decompression in bounded memory."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import pytest

from keel_megatron.corpus.readers.streams import blocks
from tests.corpus.files import COMPRESS, file_at, peak_bytes, skipping


@pytest.mark.security
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_decompression_bomb_takes_no_memory(
    tmp_path: Path, compression: Literal["gzip", "zstd"]
) -> None:
    path = tmp_path / "bomb.jsonl"
    path.write_bytes(COMPRESS[compression](bytes(100 << 20)))
    file = file_at(path, kind="jsonl", compression=compression)
    assert file.size < 400_000
    assert peak_bytes(lambda: sum(map(len, blocks(file)))) < 80 << 20


@pytest.mark.security
def test_a_record_of_a_bomb_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel_megatron.corpus.readers.jsonl.LARGEST_RECORD", 1 << 20)
    path = tmp_path / "bomb.jsonl"
    path.write_bytes(gzip.compress(bytes(50 << 20) + b'\n{"text": "after"}\n'))
    file = file_at(path, kind="jsonl", compression="gzip")

    def read() -> None:
        found, tally = skipping(file)
        assert (found, tally.bad) == (["after"], 1)

    assert peak_bytes(read) < 16 << 20


def test_a_range_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 8192)
    file = file_at(path, kind="text")
    whole = path.read_bytes()
    assert b"".join(blocks(file)) == whole
    assert b"".join(blocks(file, 100, 1_500_000)) == whole[100:1_500_000]
    assert b"".join(blocks(file, 2_000_000)) == whole[2_000_000:]
    assert b"".join(blocks(file, 5, 5)) == b""
