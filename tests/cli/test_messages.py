"""What commands say when something is not there or cannot be written."""

from __future__ import annotations

from pathlib import Path

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
            "--out: no/x.json cannot be written: its folder does not exist",
        ),
        (["bench", "CONFIG", "--profile", "no/x.json"], "--profile: no/x.json cannot be written"),
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
