"""The format of a file, by suffix and content."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
import tarfile
from pathlib import Path

import pytest

from keel_megatron.errors import UserError
from tests.corpus.files import arrow, found, json_lines, parquet, table, zstd

LINES = json_lines({"text": "one"}, {"text": "two"})
TABLE = table(["one", "two"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"text", ("text", "")),
        ("a", b"text", ("text", "")),
        ("a.py", b"print()", ("text", "")),
        ("a.txt", LINES, ("text", "")),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), ("text", "gzip")),
        ("a.zst", zstd(b"text"), ("text", "zstd")),
        ("a.jsonl", LINES, ("jsonl", "")),
        ("a.NDJSON", LINES, ("jsonl", "")),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0), ("jsonl", "gzip")),
        ("a.jsonl.gz", LINES, ("jsonl", "")),
        ("a.jsonl", gzip.compress(LINES, mtime=0), ("jsonl", "gzip")),
        ("a.jsonl.zst", b"\x50\x2a\x4d\x18\x01\0\0\0x" + zstd(LINES), ("jsonl", "zstd")),
        ("a.json", LINES, ("jsonl", "")),
        ("c4.json.gz", gzip.compress(json_lines({"text": "x" * 100_000})), ("jsonl", "gzip")),
        ("a.parquet", parquet(TABLE), ("parquet", "")),
        ("a", parquet(TABLE), ("parquet", "")),
        ("a.arrow", arrow(TABLE), ("huggingface", "")),
        ("a", arrow(TABLE, is_file=True), ("huggingface", "")),
    ],
)
def test_the_format_is_recognised(
    tmp_path: Path, name: str, content: bytes, expected: tuple[str, str]
) -> None:
    (tmp_path / name).write_bytes(content)
    (file,) = found(tmp_path).files
    assert (file.kind, file.compression) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason", "message"),
    [
        (
            "a.json",
            b'{\n "text": "x"\n}',
            "unsupported format",
            "JSON lines",
        ),
        ("a.json", b'{"name": "x"}', "unsupported format", "set `format: text`"),
        ("a.csv", b"a,b", "unsupported format", "set `format: text`"),
        ("a.html.gz", gzip.compress(b"<a>", mtime=0), "unsupported format", "set `format: text`"),
        ("a.parquet", b"PAQ1", "damaged", "is not a Parquet file, or is damaged"),
        ("a.parquet.gz", gzip.compress(parquet(TABLE)), "unsupported format", "decompress it"),
        ("a.txt.bz2", bz2.compress(b"x"), "unsupported compression", "is a bzip2 file; use gzip"),
        ("a.jsonl.xz", lzma.compress(b"x"), "unsupported compression", "is a xz file; use gzip"),
        ("a.zip", b"PK\x03\x04", "unsupported compression", "is a zip file"),
        ("a.bin", b"\0\1", "not readable UTF-8 text", "is not text: it contains NUL bytes"),
    ],
)
def test_what_is_not_read_is_named_and_counted(
    tmp_path: Path, name: str, content: bytes, reason: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^data.text: .*" + message):
        found(path)
    (tmp_path / "b.txt").write_text("text")
    (skipped,) = found(tmp_path).skipped
    assert (skipped.reason, skipped.bytes) == (reason, len(content))
    assert name.endswith(skipped.suffix)


def test_a_tape_archive_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "b.txt", "b.txt")
    (skipped,) = found(tmp_path).skipped
    assert (skipped.suffix, skipped.reason) == (".tar.gz", "not readable UTF-8 text")


def test_utf_16_is_named_where_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text", encoding="utf-16")
    (skipped,) = found(tmp_path).skipped
    assert (skipped.suffix, skipped.reason) == (".txt", "UTF-16 text, not UTF-8")


def test_a_given_format_decides(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(LINES)
    (tmp_path / "b.csv").write_bytes(b"a,b")
    (tmp_path / "c.txt").write_bytes(LINES)
    (tmp_path / "d.parquet").write_bytes(parquet(TABLE))

    def taken(path: Path, wanted: str) -> list[tuple[str, str]]:
        return [(file.name, file.kind) for file in found(path, format=wanted).files]

    assert taken(tmp_path, "text") == [(name, "text") for name in ("a.json", "b.csv", "c.txt")]
    assert taken(tmp_path, "jsonl") == [("a.json", "jsonl")]
    assert taken(tmp_path, "parquet") == [("d.parquet", "parquet")]
    assert taken(tmp_path / "*.txt", "jsonl") == [("c.txt", "jsonl")]
    assert taken(tmp_path / "c.txt", "jsonl") == [("c.txt", "jsonl")]
    with pytest.raises(UserError, match=r"data.sources.0: .*c.txt is text, not parquet"):
        found(tmp_path / "c.txt", format="parquet")
    with pytest.raises(UserError, match=r"data.sources.0: there is no text in"):
        found(tmp_path, format="megatron")
    assert found(tmp_path).kind == "mixed"


@pytest.mark.parametrize(
    ("name", "content", "package"),
    [("a.zst", zstd(b"x"), "zstandard"), ("a.parquet", parquet(TABLE), "pyarrow")],
)
def test_a_missing_package_is_named(
    tmp_path: Path, name: str, content: bytes, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}.*pip install 'keel-mega"):
        found(tmp_path)
