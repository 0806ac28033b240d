"""What commands say when something is not there or cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner

import yaml
from keel_megatron.cli.main import app
from keel_megatron.errors import UserError
from tests.settings import settings


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["generate", "nowhere", "--prompt", "x"],
            "nowhere contains no run: it does not exist",
        ),
        (
            ["generate", ".", "--prompt", "x"],
            "contains no run: there is no config.yaml in it",
        ),
        (["checkpoint", "list", "nowhere"], "no nowhere/checkpoints; a run's folder is runs/NAME"),
        (
            ["bench", "CONFIG", "--out", "no/x.json"],
            "--out: no/x.json cannot be written: No such file or directory",
        ),
        (["bench", "CONFIG", "--out", "."], "--out: . cannot be written: it is a folder"),
        (["bench", "CONFIG", "--profile", "no/x.json"], "--profile: no/x.json cannot be written"),
        (["bench", "CONFIG", "--profile", "."], "--profile: . cannot be written: it is a folder"),
        (["plan", "CONFIG", "--plot", "."], "--plot: . cannot be written: it is a folder"),
        (["plan", "CONFIG", "--trace-plot", "."], "--trace-plot: . cannot be written: it is"),
        (
            ["study", "gradient-flow", "--out", "/proc/x"],
            "--out: /proc/x cannot be written",
        ),
    ],
)
def test_a_wrong_place_is_one_message(
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [config if argument == "CONFIG" else argument for argument in arguments]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UserError), done.output
    assert expected in str(done.exception)


def test_a_plot_goes_through_a_link(config: str, tmp_path: Path) -> None:
    link = tmp_path / "plan.png"
    link.symlink_to(tmp_path / "real.png")
    done = CliRunner().invoke(app, ["plan", config, "--gpu", "cpu", "--plot", str(link)])
    assert done.exit_code == 0, done.output
    assert link.is_symlink()
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_fails_does_not_lose_the_plan(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("keel_megatron.runtime.files.write_whole", full)
    plot = str(tmp_path / "plan.png")
    done = CliRunner().invoke(app, ["plan", config, "--gpu", "cpu", "--plot", plot])
    assert str(done.exception) == f"--plot: {plot} cannot be written: No space left on device"
    assert "GB" in done.stdout
