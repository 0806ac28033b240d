"""Files of prompts, and of completions."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from keel_megatron.config import UserError
from keel_megatron.config.terminal import printable
from keel_megatron.inference.generate import Completion
from keel_megatron.inference.prompts import json_lines, read_prompts, write_out


def test_lines_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('one\n{"two"\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", '{"two"']
    (tmp_path / "a.jsonl").write_text('"one\\nline"\n\n{"prompt": "é", "id": 3}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\nline", "é"]


def test_files_of_other_systems(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two \x0c\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "  two \x0c"]
    (tmp_path / "a.jsonl").write_bytes('\ufeff"a\u2028b"\r\n\r\n"c"'.encode())
    assert read_prompts(tmp_path / "a.jsonl") == ["a\u2028b", "c"]


def test_an_earlier_file_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, link = tmp_path / "out.jsonl", tmp_path / "link"
    out.write_text("earlier")
    link.symlink_to(out)
    completions = [Completion("a", "é\x85", 1, "stop text")]
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr("keel_megatron.runtime.files.os.open", Mock(side_effect=full))
        with pytest.raises(UserError, match=r"--out: .* No space left on device; its lines are p"):
            write_out(link, completions)
    assert out.read_text() == "earlier"
    assert capsys.readouterr().out == json_lines(completions)
    write_out(link, completions)
    assert out.read_text(encoding="utf-8") == json_lines(completions, ascii_only=False)
    assert link.is_symlink()


def test_completions_are_json_lines() -> None:
    line = json_lines([Completion("a\n", "é\x7f\x85", 1, "stop text")])
    assert line.isascii()
    assert line == printable(line)  # a console changes nothing in it
    assert line.count("\n") == 1
    shown = {"prompt": "a\n", "text": "é\x7f\x85", "tokens": 1, "ended": "stop text"}
    assert json.loads(line) == shown


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "has no prompts"),
        ("a.txt", b"\xff\xff", "it is not UTF-8"),
        ("a.jsonl", b'"a"\n[1]\n', "line 2 of .* must be a string or"),
        ("a.jsonl", b'{"text": "a"}\n', "line 1 of .* must be a string or"),
        ("a.jsonl", b'"a"\n\n"\\ud800"', "line 3 of .* must be a string or"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .* must be a string or"),
        ("a.txt", b"\n \r\n", "has no prompts"),
        ("none", None, "cannot be read: No such file"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_prompts(tmp_path / name)
