"""Plain text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.corpus.readers import Tally, read, units
from keel_megatron.errors import UserError
from tests.corpus.files import COMPRESS, file_at, peak_bytes, skipping, texts


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_a_file_is_one_document_as_it_is(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.txt"
    text = "\ufeffé one\r\ntwo\ufeff\r\rthree \U0001f600" * 100_000
    path.write_bytes(COMPRESS[compression](text.encode()))
    file = file_at(path, kind="text", compression=compression)
    assert texts(file) == {"a.txt": text.removeprefix("\ufeff")}


@pytest.mark.parametrize("character", ["é", "\U0001f600"])
def test_characters_across_blocks_of_reading(tmp_path: Path, character: str) -> None:
    path = tmp_path / "long.txt"
    encoded = character.encode()
    path.write_bytes(b"a" * ((1 << 20) - 1) + encoded + b"b")
    assert texts(file_at(path, kind="text"))["long.txt"].endswith(f"a{character}b")
    for wrong in (encoded[:-1] + b"b", encoded[:-1]):
        path.write_bytes(b"a" * ((1 << 20) - 1) + wrong)
        message = rf"^{path}, line 1, byte 1,048,575: is not UTF-8 text"
        with pytest.raises(UserError, match=message):
            texts(file_at(path, kind="text"))


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
@pytest.mark.parametrize("wrong", [b"\0", b"\xff"])
def test_a_damaged_text_is_left_out_whole(tmp_path: Path, compression: str, wrong: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(COMPRESS[compression](b"line\n" * 500_000 + wrong + b"line\n"))
    found, tally = skipping(file_at(path, kind="text", compression=compression))
    assert (found, tally.bad) == ([], 1)
    assert tally.first_bad is not None
    assert tally.first_bad.where().endswith("byte 2,500,000")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_truncated_text_is_left_out_whole(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(COMPRESS[compression](b"line\n" * 500_000)[:-3])
    found, tally = skipping(file_at(path, kind="text", compression=compression))
    assert (found, tally.bad) == ([], 1)


def test_a_blank_text_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" \n\u00a0\n")
    tally = Tally("stop")
    assert texts(file_at(path, kind="text"), tally=tally) == {}
    assert (tally.blank, tally.bad) == (1, 0)


def test_a_file_that_grows_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("one")
    file = file_at(path, kind="text")
    path.write_text("one, two")
    with pytest.raises(UserError, match=r"log.txt changed .*3 bytes, then 8"):
        texts(file)
    path.unlink()
    with pytest.raises(UserError, match=r"log.txt cannot be read: No such file"):
        texts(file)


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_memory_does_not_grow_with_a_line(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "line.txt"
    path.write_bytes(COMPRESS[compression](b"no end of the line " * 5_000_000))
    file = file_at(path, kind="text", compression=compression)

    def lengths() -> int:
        (unit,) = units(file, 1)
        return sum(len(chunk) for d in read(unit, Tally("stop")) for chunk in d.chunks)

    assert peak_bytes(lengths) < 48 << 20
