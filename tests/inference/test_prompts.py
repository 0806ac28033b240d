"""Files of prompts, and of completions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keel_megatron.config import UserError
from keel_megatron.inference.generate import Completion
from keel_megatron.inference.prompts import json_lines, read_prompts


def test_lines_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('one\n{"two"\n')
    assert read_prompts(tmp_path / "a.txt") == ["one", '{"two"']
    (tmp_path / "a.jsonl").write_text('"one\\nline"\n\n{"prompt": "é", "id": 3}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\nline", "é"]


def test_completions_are_json_lines() -> None:
    line = json_lines([Completion("a\n", "é", 1, "stop text")])
    assert line.count("\n") == 1
    assert json.loads(line) == {"prompt": "a\n", "text": "é", "tokens": 1, "ended": "stop text"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "has no prompts"),
        ("a.txt", b"\xff\xff", "it is not UTF-8"),
        ("a.jsonl", b'"a"\n[1]\n', "line 2 of .* must be a string or"),
        ("a.jsonl", b'{"text": "a"}\n', "line 1 of .* must be a string or"),
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
