"""`keel completion`: what the Tab key offers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keel_megatron.cli.completion import settings
from keel_megatron.cli.main import app


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_settings(tmp_path: Path) -> None:
    keel = tmp_path / "keel"
    keel.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m keel_megatron "$@"\n')
    keel.chmod(0o755)
    script = CliRunner().invoke(app, ["completion", "bash"]).stdout
    lines = ("keel tr", "keel train x.yaml model.residual=ke", "keel plan x.yaml --sea")
    calls = [
        f'COMP_LINE="{line}"; COMP_POINT={len(line)}; _keel_completion {keel} 2>/dev/null; '
        'echo "${COMPREPLY[*]}"'
        for line in lines
    ]
    command = "\n".join([script, *calls])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["train track", "keel", "--search"], done.stderr


def test_other_shells_have_a_script() -> None:
    for shell, words in (("zsh", "compdef _keel_completion keel"), ("fish", "--command keel")):
        done = CliRunner().invoke(app, ["completion", shell])
        assert words in done.stdout
        assert "_KEEL_COMPLETE=complete_" + shell in done.stdout
    assert CliRunner().invoke(app, ["completion", "csh"]).exit_code == 2


def test_settings_and_their_values() -> None:
    names = [name for name, _help in settings("model.")]
    assert "model.blocks=" in names
    assert ("model.alpha=", "") not in settings("model.al")
    assert [name for name, _help in settings("model.residual=hyper")] == [
        "model.residual=hyper_connections"
    ]
    assert {"training.precision=fp32", "training.precision=bf16"} <= {
        name for name, _help in settings("training.precision=")
    }
    assert [name for name, _help in settings("tracking.mlflow=t")] == ["tracking.mlflow=true"]
    assert settings("nothing.") == []
