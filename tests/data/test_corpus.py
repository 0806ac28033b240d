"""The text of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.config import UserError
from keel_megatron.data.corpus import find_corpus, split


def ignore(_text: str) -> None:
    pass


def sides(corpus, fraction: float) -> tuple[list, list]:
    training, validation = split(corpus, fraction)
    return list(training()), list(validation())


def test_the_demo_corpus_is_the_standard_library() -> None:
    corpus = find_corpus(None, ignore)
    names = {file.name for file in corpus.files}
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= names
    assert not any("site-packages" in name or "/tests/" in name for name in names)
    assert corpus.size > 5e6


def test_documents_are_split_once_and_for_all() -> None:
    corpus = find_corpus(None, ignore)
    training, validation = sides(corpus, 0.02)
    a = {document.name for document in training}
    b = {document.name for document in validation}
    assert not a & b
    assert len(b) == pytest.approx(0.02 * len(corpus.files), abs=1)
    again = sides(find_corpus(None, ignore), 0.02)
    assert [document.name for document in again[1]] == [document.name for document in validation]


def test_a_single_file_is_cut_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\r\n" for number in range(1000))
    path = tmp_path / "one.txt"
    path.write_bytes(text.encode())
    training, validation = sides(find_corpus((path,), ignore), 0.1)
    assert training[0].text + validation[0].text == text
    assert training[0].text.endswith("\n")
    assert len(validation[0].text) == pytest.approx(0.1 * len(text), rel=0.02)


def test_a_folder_gives_its_text_files_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "image.bin").write_bytes(b"\0\1")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    said: list[str] = []
    corpus = find_corpus((tmp_path,), said.append)
    assert [file.name for file in corpus.files] == ["b/two.md", "one.txt"]
    assert len(said) == 1
    assert "left out 2 files" in said[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"caf\xe9", "is not UTF-8 text (byte 3)"),
        (b"a\0b", "holds NUL bytes"),
        (b"", "there is no text in"),
    ],
)
def test_a_file_without_text_is_named(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        find_corpus((path,), ignore)
    assert "data.text" in str(caught.value)
    assert expected in str(caught.value)


def test_the_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = find_corpus((path,), ignore).fingerprint()
    assert find_corpus((path,), ignore).fingerprint() == first
    path.write_text("two")
    assert find_corpus((path,), ignore).fingerprint() != first
