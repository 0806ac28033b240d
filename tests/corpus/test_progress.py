"""The progress of a build."""

from __future__ import annotations

import io
import os
import pty
import sys
import termios
from pathlib import Path

import pytest

from keel_megatron.corpus.progress import BuildProgress
from keel_megatron.corpus.tokenize import Done


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_at_intervals_and_in_the_log(tmp_path: Path) -> None:
    clock, said = Clock(), list[str]()
    progress = BuildProgress(said.append, tmp_path / "log", io.StringIO(), clock)
    progress.begin(100_000_000)
    for _ in range(10):
        clock.now += 2.0
        progress.add(Done(bytes=1_000_000, documents=10, tokens=400_000))
    progress.close()
    assert said == [
        "  3%, 3m 14s left: 30 documents, 1,200,000 tokens, 0.5 MB/s, 200,000 tokens/s",
        "  6%, 3m 08s left: 60 documents, 2,400,000 tokens, 0.5 MB/s, 200,000 tokens/s",
        "  9%, 3m 02s left: 90 documents, 3,600,000 tokens, 0.5 MB/s, 200,000 tokens/s",
    ]
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == said


def test_one_live_line_on_a_terminal(tmp_path: Path) -> None:
    clock, said, terminal = Clock(), list[str](), Terminal()
    progress = BuildProgress(said.append, tmp_path / "log", terminal, clock)
    progress.begin(10)
    for _ in range(10):
        clock.now += 1.0
        progress.add(Done(bytes=1))
    assert terminal.getvalue().count("\r") == 10
    assert "\n" not in terminal.getvalue()
    progress.say("a message")
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert said == ["a message"]
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    progress.close()


def test_the_live_line_is_cut_at_the_terminals_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    clock, terminal = Clock(), Terminal()
    progress = BuildProgress(print, tmp_path / "log", terminal, clock)
    progress.begin(10)
    clock.now += 1.0
    progress.add(Done(bytes=1))
    assert terminal.getvalue() == "\r 10%, 0m 09s left: \x1b[K"
    progress.close()


def test_the_width_is_that_of_the_streams_own_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the interpreter's stdout is detached, as in every command."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", None)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 60))
    clock = Clock()
    with open(theirs, "w") as terminal:
        progress = BuildProgress(print, tmp_path / "log", terminal, clock)
        progress.begin(10)
        clock.now += 1.0
        progress.add(Done(bytes=1, documents=1_000, tokens=1_000_000_000))
        shown = os.read(ours, 1000).decode()
        progress.close()
    os.close(ours)
    assert shown == "\r 10%, 0m 09s left: 1,000 documents, 1,000,000,000 tokens, 0\x1b[K"
    assert len(shown) == len("\r" + "\x1b[K") + 59


def test_more_bytes_than_expected(tmp_path: Path) -> None:
    progress = BuildProgress(print, tmp_path / "log", io.StringIO())
    assert progress.line().startswith("100%")
    progress.begin(10)
    assert "? left" in progress.line()
    progress.add(Done(bytes=20))
    assert progress.line().startswith("100%")
