"""Files and texts of strangers: what they may cost, and what a terminal is not sent."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from keel_megatron.config.reading import lines_of, open_regular, parse_json, read_small
from keel_megatron.config.terminal import printable
from keel_megatron.config.yaml_text import read_yaml

pytestmark = pytest.mark.security

MERGES = "a0: &a0 {k: 1, l: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)
ALIASES = "a0: &a0 [1, 2]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MERGES, "it expands to more than 100,000 values"),
        (ALIASES, "it expands to more than 100,000 values"),
        ("a: &a [1]\n? [*a, *a]\n: 1\n", "a key is not a scalar (line 2, column 3)"),
        ("a: &a [1]\n*a : 1\n", "a key is not a scalar"),
        ("? {a: 1}\n: 1\n", "a key is not a scalar"),
        ("a: &a [*a]\n", "the alias *a has no anchor before it"),
        ("[" * 100_000, "it is nested more than 32 levels deep"),
        ("a: " * 1 + "{a: " * 100_000, "it is nested more than 32 levels deep"),
        ("a: 1" + "0" * 5000, "Exceeds the limit"),
    ],
)
def test_a_yaml_text_costs_what_its_length_suggests(text: str, expected: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"is not valid YAML") as caught:
        read_yaml(text)
    assert expected in str(caught.value)
    assert time.process_time() - started < 5.0


def test_aliases_and_merge_keys_of_a_sensible_size_are_read() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n"
    a = {"x": 1, "y": [1, 2]}
    assert read_yaml(text) == {"a": a, "b": {**a, "x": 2}, "c": [a, a]}


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """A FIFO would be waited for, and a device has no end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        for read in (read_small, open_regular):
            with pytest.raises(OSError, match="is not a regular file"):
                read(path)


def test_a_long_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.truncate(200 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match="has more than 1,048,576 bytes"):
        read_small(path)
    with open_regular(path) as stream, pytest.raises(ValueError, match="a line of more than"):
        list(lines_of(stream))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    path.write_bytes(b"12345678")
    assert read_small(path, 8) == b"12345678"


def test_deep_json_is_an_error_like_any() -> None:
    for text in ("[" * 100_000, "1" * 5000, "{"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)


def test_what_would_steer_a_terminal_is_shown() -> None:
    clipboard = "\x1b]52;c;ZXZpbA==\x07"
    assert printable(f"a{clipboard}b") == "a\\x1b]52;c;ZXZpbA==\\x07b"
    assert printable("\x9b2J \r \x7f \u202e \udcff \u2066") == (
        "\\x9b2J \\r \\x7f \\u202e \\udcff \\u2066"
    )
    assert (
        printable("plain, žluťoučký, 数, 👩‍👩‍👧\n\ttext") == "plain, žluťoučký, 数, 👩‍👩‍👧\n\ttext"
    )
    assert printable("two\nlines\tand", one_line=True) == "two\\nlines\\tand"
