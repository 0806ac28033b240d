"""What is shown of the runs at work, on a terminal and in the log."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from keel_megatron.studies.status import SECONDS_BETWEEN_LINES, RunStatus, Status
from keel_megatron.tracking.screen import Screen

START = 1_000_000_000_000
"""Milliseconds since 1970."""


def step(number: int, loss: float, seconds_since_start: float) -> str:
    time = START + round(1000 * seconds_since_start)
    return json.dumps({"step": number, "loss": loss, "seconds": 9.0, "time": time}) + "\n"


def test_step_loss_and_time_left(tmp_path: Path) -> None:
    """As they are appended; the time without the first step and with validations."""
    metrics = tmp_path / "metrics.jsonl"
    status = RunStatus("keel-64", metrics, 100, START)
    assert status.line() == "keel-64: starting"
    metrics.write_text(step(1, 9.0, 50.0))
    assert status.line() == "keel-64: step 1/100, loss 9.0000, 14m 51s left"
    with metrics.open("a") as file:
        file.write(step(2, 8.0, 51.0) + '{"step": 2, "validation_loss": 8.5, "time": 1}\n')
        file.write("not JSON\n" + step(11, 7.5, 70.0) + step(12, 7.0, 71.0)[:-9])
    assert status.line() == "keel-64: step 11/100, loss 7.5000, 2m 58s left"
    metrics.write_text(step(1, 9.0, 50.0) + step(3, float("nan"), 80.0))  # a rollback
    assert status.line() == "keel-64: step 3/100, loss nan, 24m 15s left"


def test_records_of_an_earlier_start_are_not_this_ones(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(step(1, 9.0, -900.0) + step(40, 5.0, -500.0))
    status = RunStatus("keel-64", metrics, 100, START)
    assert status.line() == "keel-64: starting"
    metrics.write_text(step(1, 9.0, -900.0))  # it resumes from a checkpoint
    assert status.line() == "keel-64: starting"
    with metrics.open("a") as file:
        file.write(step(41, 5.0, 10.0) + step(43, 4.0, 14.0))
    assert status.line() == "keel-64: step 43/100, loss 4.0000, 1m 54s left"


def shown(tmp_path: Path, stream: io.StringIO) -> list[str]:
    """Twelve minutes of two runs, of which the second starts after six; lines of the log."""
    now = [0.0]
    screen = Screen(tmp_path / "study.log", stream)
    status = Status(screen, lambda: now[0])
    (tmp_path / "a.jsonl").write_text(step(7, 3.0, 1.0))
    runs = [RunStatus(name, tmp_path / f"{name}.jsonl", 100, START) for name in "ab"]
    for second in range(0, 721, 20):
        now[0] = float(second)
        status.show(runs if second >= 360 else runs[:1])
        if second == 400:
            screen.say("a message")
    status.end()
    screen.say("the end")
    screen.close()
    lines = (tmp_path / "study.log").read_text().splitlines()
    return [line.split(" ", 1)[1] for line in lines]


A, B = "a: step 7/100, loss 3.0000, 13m 57s left", "b: starting"


def test_the_log_has_a_line_every_five_minutes(tmp_path: Path) -> None:
    assert SECONDS_BETWEEN_LINES == 300
    stream = io.StringIO()
    log = shown(tmp_path, stream)
    assert log == [A, "a message", A, B, "the end"]
    assert stream.getvalue().splitlines() == log


def test_a_terminal_has_a_line_for_each_run_and_so_has_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("keel_megatron.tracking.screen._SECONDS_PER_REFRESH", 0.0)
    stream = Terminal()
    assert shown(tmp_path, stream) == [A, "a message", A, B, "the end"]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert text.count(A) > 30  # drawn again and again
    assert text.count(B) > 15
    assert "\x1b[2K" in stream.getvalue()  # over the last ones
    assert text.splitlines()[-1] == "the end"
    assert text.index(B) < text.rindex("\n")
