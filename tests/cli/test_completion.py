"""`keel completion`: what the Tab key offers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keel_megatron.cli.choices import one_of, some_of
from keel_megatron.cli.completion import configurations, settings
from keel_megatron.cli.main import app
from keel_megatron.config.bundled import bundled_names


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_settings(tmp_path: Path) -> None:
    keel = tmp_path / "keel"
    keel.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m keel_megatron "$@"\n')
    keel.chmod(0o755)
    script = CliRunner().invoke(app, ["completion", "bash"]).stdout
    wanted = {
        "keel tr": "train track",
        "keel train x.yaml model.residual=ke": "keel",
        "keel study depth-tasks paper/keel_6 --tasks hops,c": "hops,chain",
        "keel plan --sea": "--search",
    }
    calls = [
        f'COMP_LINE="{line}"; COMP_POINT={len(line)}; _keel_completion {keel} 2>/dev/null; '
        'echo "${COMPREPLY[*]}"'
        for line in wanted
    ]
    command = "\n".join([script, *calls])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == list(wanted.values()), done.stderr


def test_other_shells_have_a_script() -> None:
    for shell, words in (("zsh", "compdef _keel_completion keel"), ("fish", "--command keel")):
        done = CliRunner().invoke(app, ["completion", shell])
        assert words in done.stdout
        assert "_KEEL_COMPLETE=complete_" + shell in done.stdout
    assert CliRunner().invoke(app, ["completion", "csh"]).exit_code == 2


def test_configurations_unless_there_are_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert configurations("dem") == ["demo"]
    assert configurations("") == bundled_names()
    assert configurations("paper/keel_1") == ["paper/keel_1024", "paper/keel_128"]
    (tmp_path / "demolition.yaml").touch()
    assert configurations("dem") == []
    assert configurations("[") == []


def test_names_that_an_option_takes() -> None:
    completed = some_of(lambda: ("hops", "chain", "permutations"))["autocompletion"]
    assert completed("") == ["hops", "chain", "permutations"]
    assert completed("hops,") == ["hops,chain", "hops,permutations"]
    assert completed("hops,ch") == ["hops,chain"]
    assert one_of(lambda: ("h100", "h200", "cpu"))["autocompletion"]("h") == ["h100", "h200"]


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
