"""The text of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config import UserError
from keel_megatron.data.corpus import (
    check_paths,
    contents_fingerprint,
    describe_split,
    find_corpus,
    split,
)


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
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    (tmp_path / "empty.txt").write_text("")
    said: list[str] = []
    corpus = find_corpus((tmp_path,), said.append)
    assert [file.name for file in corpus.files] == ["b/two.md", "one.txt"]
    assert said == [
        f"data.text: skipped in {tmp_path}: 1 hidden (such as .hidden), 2 not readable UTF-8 text "
        "(such as image.bin)"
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"abc\xe9", "is not UTF-8 text (byte 3)"),
        (b"a\0b", "contains NUL bytes"),
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

    def fingerprint() -> str:
        return contents_fingerprint(find_corpus((path,), ignore).contents())

    first = fingerprint()
    assert fingerprint() == first
    path.write_text("two")
    assert fingerprint() != first
    path.write_text("one")
    path = path.rename(tmp_path / "b.txt")
    assert fingerprint() != first


def test_blank_files_take_no_part(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"blank{number}.txt").write_text(" \n\t\n")
    with pytest.raises(UserError, match=r"data.text: there is no text in"):
        find_corpus((tmp_path,), ignore)
    (tmp_path / "one.txt").write_text("a line\n" * 100)
    corpus = find_corpus((tmp_path,), ignore)
    assert [file.name for file in corpus.files] == ["one.txt"]
    training, validation = sides(corpus, 0.1)
    assert training[0].text + validation[0].text == "a line\n" * 100


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(f"of {folder}")
    corpus = find_corpus((tmp_path / "a", tmp_path / "b" / "text.txt"), ignore)
    assert [file.name for file in corpus.files] == ["text.txt", "text.txt~2"]
    training, validation = sides(corpus, 0.1)
    assert {training[0].text, validation[0].text} == {"of a", "of b"}


def test_a_file_reached_twice_is_one_document(tmp_path: Path) -> None:
    """Else the same text would be trained on and validated with."""
    inner = tmp_path / "inner"
    inner.mkdir()
    for number in range(4):
        (inner / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "link.txt").symlink_to(inner / "0.txt")
    corpus = find_corpus((tmp_path, inner, inner / "0.txt"), ignore)
    assert len(corpus.files) == 4
    training, validation = sides(corpus, 0.25)
    assert not {d.text for d in training} & {d.text for d in validation}


@pytest.mark.parametrize("title", ["Title\n", ""])
def test_a_long_line_is_cut_where_the_fraction_says(tmp_path: Path, title: str) -> None:
    text = title + "many words and no end of the line " * 1000
    (tmp_path / "one.txt").write_text(text)
    training, validation = sides(find_corpus((tmp_path,), ignore), 0.02)
    assert training[0].text + validation[0].text == text
    assert len(validation[0].text) == pytest.approx(0.02 * len(text), rel=0.01)


@pytest.mark.parametrize("character", ["é", "\U0001f600"])
def test_characters_across_blocks_of_reading(tmp_path: Path, character: str) -> None:
    path = tmp_path / "long.txt"
    encoded = character.encode()
    path.write_bytes(b"a" * ((1 << 20) - 1) + encoded + b"b")
    (document,) = find_corpus((path,), ignore).documents()
    assert document.text.endswith(f"a{character}b")
    for wrong in (encoded[:-1] + b"b", encoded[:-1]):
        path.write_bytes(b"a" * ((1 << 20) - 1) + wrong)
        with pytest.raises(UserError, match=r"not UTF-8 text \(byte 1048575\)"):
            find_corpus((path,), ignore)


def test_a_file_that_grows_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("one")
    corpus = find_corpus((path,), ignore)
    path.write_text("one, two")
    with pytest.raises(UserError, match=r"data.text: .*log.txt changed .*3 bytes, then 8"):
        list(corpus.documents())


def test_a_path_that_cannot_be_one() -> None:
    with pytest.raises(UserError, match=r"data.text: a+ cannot be read: File name too long"):
        find_corpus((Path("a" * 300),), ignore)


def test_links_are_followed_once_and_the_rest_is_counted(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    for folder in (elsewhere, root / "own"):
        folder.mkdir(parents=True)
        (folder / "text.txt").write_text(folder.name)
    (root / "a_link").symlink_to(elsewhere)
    (root / "another").symlink_to(elsewhere)
    (root / "an_own_link").symlink_to(root / "own")
    (elsewhere / "cycle").symlink_to(root)
    (root / "broken").symlink_to(tmp_path / "nothing")
    (root / "file.txt").symlink_to(elsewhere / "text.txt")
    os.mkfifo(root / "pipe")
    said: list[str] = []
    corpus = find_corpus((root,), said.append)
    # A folder that is there is called by its own path, as it was before links were followed.
    assert [file.name for file in corpus.files] == ["a_link/text.txt", "own/text.txt"]
    assert said == [
        f"data.text: skipped in {root}: 1 broken link (such as broken), "
        "1 neither file nor folder (such as pipe)"
    ]


def test_a_folder_of_links_alone_has_text(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("text")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "there").symlink_to(tmp_path / "there")
    check_paths((tmp_path / "links",))
    assert len(find_corpus((tmp_path / "links",), ignore).files) == 1
    (tmp_path / "there" / "a.txt").rename(tmp_path / "there" / ".hidden")
    with pytest.raises(UserError, match=r"data.text: there is no text in .*links"):
        check_paths((tmp_path / "links",))


def test_a_folder_that_cannot_be_entered_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, as whom tests may run, may enter any
    said: list[str] = []
    assert len(find_corpus((tmp_path,), said.append).files) == 1
    assert said == [f"data.text: skipped in {tmp_path}: 1 unreadable folder (such as closed)"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "mark.txt").write_bytes(mark)
    (tmp_path / "blank.txt").write_bytes(mark + b" \n")
    (tmp_path / "text.txt").write_bytes(mark + "a\ufeffb".encode())
    corpus = find_corpus((tmp_path,), ignore)
    assert [document.text for document in corpus.documents()] == ["a\ufeffb"]


def test_the_validation_side_is_told_as_it_is(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("word " * 10)
    text = describe_split(find_corpus((tmp_path,), ignore), 0.01)
    assert text.startswith("validation: 1 of 12 documents, 8.3% of the bytes")


def test_files_whose_syntax_is_learned_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    said: list[str] = []
    find_corpus((tmp_path / "a.jsonl",), said.append)
    assert "1 of 1 files" in said[0]
    assert "will learn their syntax too" in said[0]
