"""The files of a run's sources."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.corpus import find
from keel_megatron.corpus.find import check_paths, list_files
from keel_megatron.errors import UserError
from tests.corpus.files import (
    data,
    found,
    ignore,
    indexed,
    json_lines,
    names,
    peak_bytes,
    sources_of,
)


def test_the_demo_corpus_is_the_standard_library() -> None:
    said: list[str] = []
    (source,) = sources_of(data(), said)
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= set(names(source))
    assert not any("site-packages" in name or "/tests/" in name for name in names(source))
    assert names(source) == sorted(names(source), key=lambda name: Path(name).parts)
    assert (source.name, source.kind, source.size > 5e6) == ("demo", "text", True)
    assert said == []


def test_a_folder_gives_its_text_files_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("two" * 1000)
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "image.bin").write_bytes(b"\0\1")
    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    (tmp_path / "empty.txt").write_text("")
    said: list[str] = []
    source = found(tmp_path, said=said)
    assert names(source) == ["b/two.md", "one.txt"]
    assert said == [
        f"data.text: skipped in {tmp_path}: 1 .txt not readable UTF-8 text (such as "
        f"{tmp_path}/latin.txt), 1 hidden (such as {tmp_path}/.hidden), 1 .bin not readable UTF-8 "
        f"text (such as {tmp_path}/image.bin), 1 .txt blank (such as {tmp_path}/empty.txt)"
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "does not exist"),
        (b"abc\xe9", "is not UTF-8 text (byte 3)"),
        (b"a\0b", "contains NUL bytes"),
        (b"\xff\xfea\0", "is UTF-16 text; convert it to UTF-8"),
        (b"", "there is no text in"),
    ],
)
def test_a_file_without_text_is_named(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        found(path)
    assert "data.text" in str(caught.value)
    assert expected in str(caught.value)


def test_blank_files_take_no_part(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"blank{number}.txt").write_text(" \n\t\u00a0\n")
    with pytest.raises(UserError, match=r"data.text: there is no text in"):
        found(tmp_path)
    (tmp_path / "long.txt").write_text(" " * 100_000 + "end")
    (tmp_path / "long_blank.txt").write_text(" " * 100_000)
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf \n")
    source = found(tmp_path)
    assert names(source) == ["long.txt"]
    assert [(s.reason, s.count) for s in source.skipped] == [("blank", 8)]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(f"of {folder}")
    assert names(found(tmp_path / "a", tmp_path / "b" / "text.txt")) == ["text.txt", "text.txt~2"]


def test_a_file_reached_twice_is_one_document(tmp_path: Path) -> None:
    """Else the same text would be trained on and validated with."""
    inner = tmp_path / "inner"
    inner.mkdir()
    for number in range(4):
        (inner / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "link.txt").symlink_to(inner / "0.txt")
    assert len(found(tmp_path, inner, inner / "0.txt").files) == 4


def test_validation_files_are_not_trained_on(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = found(tmp_path, validation=str(tmp_path / "b.txt"))
    assert [(f.name, f.part) for f in source.files] == [
        ("a.txt", "both"),
        ("c.txt", "both"),
        ("b.txt", "validation"),
    ]
    with pytest.raises(UserError, match=r"data.sources.0: there is no text in .*a.txt"):
        found(tmp_path / "a.txt", validation=str(tmp_path / "a.txt"))
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match=r"data.sources.0.validation: there is no text in .*blank"):
        found(tmp_path / "a.txt", validation=str(tmp_path / "blank.txt"))


def test_a_path_that_cannot_be_one() -> None:
    with pytest.raises(UserError, match=r"data.text: a+ cannot be read: File name too long"):
        found(Path("a" * 300))


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
    source = found(root)
    # A folder that is there is called by its own path, as it was before links were followed.
    assert names(source) == ["a_link/text.txt", "own/text.txt"]
    assert {(s.reason, s.first) for s in source.skipped} == {
        ("broken link", f"{root}/broken"),
        ("neither file nor folder", f"{root}/pipe"),
    }


def test_a_folder_that_cannot_be_entered_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, as whom tests may run, may enter any
    (skipped,) = found(tmp_path).skipped
    assert (skipped.reason, skipped.first) == ("cannot be read", f"{tmp_path}/closed")


def test_names_follow_paths_part_by_part(tmp_path: Path) -> None:
    for name in ("a/z.txt", "a.txt", "a-b/c.txt", "b/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    expected = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.txt"))]
    assert names(found(tmp_path)) == expected == ["a/z.txt", "a-b/c.txt", "a.txt", "b/a.txt"]


def test_globs(tmp_path: Path) -> None:
    for name in ("x/one.jsonl", "y/one.jsonl", "y/two.txt", "y/deep/three.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(json_lines({"text": name}))
    (tmp_path / "y" / "table.csv").write_text("a,b")
    assert names(found(tmp_path / "*" / "*.jsonl")) == ["x/one.jsonl", "y/one.jsonl"]
    every = names(found(tmp_path / "**" / "*.jsonl"))
    assert every == ["x/one.jsonl", "y/deep/three.jsonl", "y/one.jsonl"]
    source = found(tmp_path / "y*" / "*")
    assert names(source) == ["y/deep/three.jsonl", "y/one.jsonl", "y/two.txt"]
    assert [s.suffix for s in source.skipped] == [".csv"]
    (tmp_path / "odd[1].txt").write_text("a file of this very name")
    assert names(found(tmp_path / "odd[1].txt")) == ["odd[1].txt"]
    with pytest.raises(UserError, match=r"data.text: no file matches .*/\*.parquet"):
        found(tmp_path / "*.parquet")


def test_names_of_sources(tmp_path: Path) -> None:
    for name in ("web.jsonl.gz", "code", "x/code"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some text")
    paths = ["web.jsonl.gz", "code", "x/code", "x/*"]
    entries: list[dict[str, Any]] = [{"path": str(tmp_path / path)} for path in paths]
    entries[0]["format"] = "text"
    sources = sources_of(data(sources=[*entries, {**entries[1], "name": "mine"}]))
    assert [s.name for s in sources] == ["web", "code", "code-2", "x", "mine"]
    assert {file.source for file in sources[2].files} == {"code-2"}
    assert [s.setting for s in sources[:2]] == ["data.sources.0", "data.sources.1"]
    with pytest.raises(UserError, match=r"data.sources: two entries have the name 'mine'"):
        sources_of(data(sources=[{**entry, "name": "mine"} for entry in entries[1:3]]))


def test_pairs_are_a_source_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    prefix = indexed(tmp_path / "tokens")
    with pytest.raises(UserError, match=r"data.text: .* \.bin and \.idx pairs, such as .*tokens"):
        found(tmp_path)
    source = found(prefix)
    assert (source.kind, source.prefixes) == ("megatron", (prefix,))
    assert names(source) == ["tokens.bin", "tokens.idx"]


def test_the_key_of_a_listing_follows_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")

    def key(**settings: Any) -> str:
        return list_files(data(sources=[{"path": str(tmp_path), **settings}]), ignore).key()

    first = key()
    assert key() == first
    assert key(text_key="content") != first
    os.utime(path, ns=(1, 1))
    assert key() != first


def test_a_quick_check_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("text")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "there").symlink_to(tmp_path / "there")
    monkeypatch.setattr(find, "classify", None)
    check_paths(data(text=str(tmp_path / "links")))
    check_paths(data(text=str(tmp_path / "there" / "*.txt")))
    check_paths(data(text=str(indexed(tmp_path / "tokens"))))
    check_paths(data(dataset=str(tmp_path / "nowhere")))
    (tmp_path / "there" / "a.txt").rename(tmp_path / "there" / ".hidden")
    with pytest.raises(UserError, match=r"data.text: there is no text in .*links"):
        check_paths(data(text=str(tmp_path / "links")))
    source = {"path": str(tmp_path / "tokens"), "validation": str(tmp_path / "no.jsonl")}
    with pytest.raises(UserError, match=r"data.sources.0.validation: .*no.jsonl does not exist"):
        check_paths(data(sources=[source]))


def test_many_files_take_little_memory_each(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"document_{number:07d}.txt").write_text("tiny")
    sources_of(data(text=str(tmp_path)))  # what is imported and cached is not counted
    assert peak_bytes(lambda: sources_of(data(text=str(tmp_path)))) < 2000 * 800
