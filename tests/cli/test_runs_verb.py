"""`keel runs` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from keel_megatron.cli.main import app
from tests.dashboard.test_runs import make_run


def test_in_a_pipe_every_run_is_a_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    make_run(tmp_path, "n" * 120)
    done = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert done.exit_code == 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("n"))
    assert line.split()[0] == "n" * 120
    assert "10/100" in line


@pytest.mark.parametrize(
    ("variables", "styled"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], styled: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    make_run(tmp_path, "one")
    done = CliRunner().invoke(app, ["runs", str(tmp_path)], color=True)
    assert ("\x1b[" in done.stdout) is styled
