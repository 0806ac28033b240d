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
