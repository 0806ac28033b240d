"""What a console cannot show, and a reader that leaves, fail no command."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import yaml
from keel_megatron.cli import console
from keel_megatron.config import terminal
from keel_megatron.errors import UserError
from tests.settings import settings


def pipe(monkeypatch: pytest.MonkeyPatch, encoding: str = "ascii") -> int:
    """Make standard output a pipe, as the interpreter sets it up; the end to read from."""
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(os.fdopen(writer, "wb"), encoding=encoding, line_buffering=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.tolerate_consoles()
    return reader


def test_what_the_console_cannot_show_is_shown_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pipe(monkeypatch)
    print("привет \ufffd \udcff", "plain")
    assert (
        os.read(reader, 1000)
        == rb"\u043f\u0440\u0438\u0432\u0435\u0442 \ufffd \udcff plain" + b"\n"
    )
    os.close(reader)


def test_a_path_for_scripts_is_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pipe(monkeypatch)
    path = Path(os.fsdecode(b"runs/\xff\xd1\x82"))
    console.print_path(path)
    assert os.read(reader, 1000) == b"runs/\xff\xd1\x82\n"
    os.close(reader)


def test_a_reader_that_leaves_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pipe(monkeypatch)
    print("one")
    os.close(reader)
    for _ in range(3):
        print("two")
        sys.stdout.flush()
    print("three", end="")
    console.print_path(Path("four"))
    sys.stdout.close()  # as the interpreter does at its end


def test_a_stream_of_somebody_elses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    console.tolerate_consoles()
    console.print_path(Path("a"))
    assert shown.getvalue() == "a\n"


@pytest.mark.parametrize("verb", ["show", "schema"])
def test_a_command_whose_reader_has_left_ends_well(tmp_path: Path, verb: str) -> None:
    """And one in a locale that cannot show its text."""
    path = tmp_path / "run.yaml"
    sections = settings(tracking__sample_prompt="привет")
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["config", verb, *([str(path)] if verb == "show" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "keel_megatron", *arguments],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.security
def test_what_a_terminal_would_obey_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for our own display."""
    reader = pipe(monkeypatch, "utf-8")
    print("a \x1b]52;c;ZXZpbA==\x07 b \x9b2J")
    assert os.read(reader, 1000) == rb"a \x1b]52;c;ZXZpbA==\x07 b \x9b2J" + b"\n"
    terminal.trusted(sys.stdout).write("\x1b[1mbold\n")
    assert os.read(reader, 1000) == b"\x1b[1mbold\n"
    os.close(reader)


@pytest.mark.parametrize("act", [lambda: print("one"), lambda: console.print_path(Path("two"))])
@pytest.mark.parametrize("outlives", [True, False])
def test_output_to_a_full_disk_ends_no_training(
    outlives: bool, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other commands fail of it, and the interpreter's end adds nothing."""
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(full, "wb")))
    console.tolerate_consoles()
    if outlives:
        console.outlive_full_disk()
    expected = "standard output cannot be written: No space left on device"
    problem = nullcontext() if outlives else pytest.raises(UserError, match=expected)
    with problem, console.report_output_errors():
        act()
    if not outlives:
        sys.stdout.close()


def test_a_full_disk_is_one_message() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "keel_megatron", "config", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    message = "error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_streams_that_are_closed_are_dev_null(tmp_path: Path) -> None:
    """A file that is opened later does not get their numbers, and so their text."""
    probe = """
import sys
from keel_megatron.cli.console import print_report, tolerate_consoles
from keel_megatron.tracking.screen import Screen
Screen(None).say("nowhere")
tolerate_consoles()
with open("data", "w") as file:
    print_report("report")
    Screen(None).say("message")
    print("warning", file=sys.stderr, flush=True)
    file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
"""
    shell = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, probe]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(shell, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "data").read_text() == "True ''"


def test_a_report_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind this module's stream, of which `shutil.get_terminal_size` knows nothing."""
    monkeypatch.delenv("COLUMNS", raising=False)
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 30, 0, 0))
    stream = io.TextIOWrapper(os.fdopen(writer, "wb"), line_buffering=True)
    monkeypatch.setattr(sys, "stdout", stream)
    console.tolerate_consoles()
    console.print_report("A sentence of more characters than are in a line.")
    assert os.read(reader, 1000) == b"A sentence of more characters\r\nthan are in a line.\r\n"
    os.close(reader)
    assert terminal.width(io.StringIO()) == 80


def test_a_report_in_a_file_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pipe(monkeypatch)
    console.print_report("word " * 60)
    assert os.read(reader, 1000).count(b"\n") == 1
    os.close(reader)
