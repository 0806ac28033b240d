"""What is said of files that are not taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from keel_megatron.corpus.skips import Skips, megabytes, report, suffix_of
from tests.corpus.files import found, names


def test_a_warning_of_several_lines_above_a_tenth_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 300_000)
    (tmp_path / "b.csv").write_text("y" * 600_000)
    (tmp_path / "c.csv").write_text("y" * 50_000)
    (tmp_path / "d.pdf").write_bytes(b"\0" * 50_000)
    said: list[str] = []
    found(tmp_path, said=said)
    assert said == [
        "!" * 78,
        f"warning: data.text: 70.0% of the bytes in {tmp_path} are left out (700.0 kB of 1.0 MB):",
        f"  2 .csv unsupported format, 650.0 kB, such as {tmp_path}/b.csv",
        f"  1 .pdf not readable UTF-8 text, 50.0 kB, such as {tmp_path}/d.pdf",
        "!" * 78,
    ]


def test_a_tenth_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 900)
    (tmp_path / "b.csv").write_text("y" * 100)
    said: list[str] = []
    found(tmp_path, said=said)
    assert said == [
        f"data.text: skipped in {tmp_path}: 1 .csv unsupported format (such as {tmp_path}/b.csv)"
    ]


def test_hidden_files_count_with_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "._a.txt").write_text("x" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "b").write_text("x" * 100)
    (hidden, folder) = found(tmp_path).skipped
    assert (hidden.reason, hidden.count, hidden.bytes) == ("hidden", 1, 100)
    assert (folder.reason, folder.count, folder.bytes) == ("hidden", 1, 0)


def test_many_suffixes_are_counted_together() -> None:
    skips = Skips()
    for number in range(1000):
        skips.add("unsupported format", f"a.{number}", number)
    entries = skips.entries()
    assert len(entries) == 21
    assert (entries[0].suffix, entries[-1].suffix) == (".999", "other suffixes")
    assert sum(entry.count for entry in entries) == 1000
    assert sum(entry.bytes for entry in entries) == 499_500


def test_nothing_skipped_says_nothing() -> None:
    said: list[str] = []
    report("data.text", "x", (), 1, said.append)
    assert said == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/a.b/c", ""),
        ("a.CSV", ".csv"),
        ("x/a.json.gz", ".json.gz"),
        ("a.tar.xz", ".tar.xz"),
        (".hidden", ""),
        ("a.2024-01-01", ""),
        ("v1.2.txt", ".txt"),
        ("a.", ""),
    ],
)
def test_suffixes(name: str, expected: str) -> None:
    assert suffix_of(name) == expected


def test_sizes() -> None:
    assert [megabytes(size) for size in (5, 5_000, 10**12)] == ["5 bytes", "5.0 kB", "1.0 TB"]


def test_names_that_are_not_text(tmp_path: Path) -> None:
    location = os.fsencode(tmp_path) + b"/\xff.txt"
    Path(os.fsdecode(location)).write_text("text")
    source = found(tmp_path)
    assert names(source) == ["\\udcff.txt"]
    assert source.files[0].path.read_text() == "text"
