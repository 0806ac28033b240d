"""`keel config`, and what every verb shares: mistakes are one message, without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import yaml
from keel_megatron import __version__
from keel_megatron.config import dump_config, load_config
from keel_megatron.config.bundled import bundled_names
from keel_megatron.config.schema import json_schema
from tests.integration.commands import environment, keel
from tests.settings import settings


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    return path


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )


def test_show_prints_the_resolved_configuration(tmp_path: Path, config_file: Path) -> None:
    done = keel(tmp_path, "config", "show", "run.yaml", "model.blocks=9", "model.blocks=12")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == dump_config(load_config(config_file, ["model.blocks=12"]))


def test_schema_prints_json(tmp_path: Path) -> None:
    done = keel(tmp_path, "config", "schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


def test_bundled_configurations_are_listed_and_copied(tmp_path: Path) -> None:
    listed = keel(tmp_path, "config", "list")
    assert listed.stdout.splitlines() == bundled_names()
    copied = keel(tmp_path, "config", "copy", "paper/keel_64")
    assert (copied.returncode, copied.stdout) == (0, "keel_64.yaml\n")
    shown = keel(tmp_path, "config", "show", "keel_64.yaml").stdout
    assert shown == keel(tmp_path, "config", "show", "paper/keel_64").stdout
    for arguments, expected in (
        (("paper/keel_64",), "FILE: keel_64.yaml cannot be written: File exists"),
        (("keel_64",), "'keel_64' must be one of demo, "),
    ):
        refused = keel(tmp_path, "config", "copy", *arguments)
        assert refused.returncode == 2
        assert expected in refused.stderr


def test_wrong_settings_are_one_message(tmp_path: Path, config_file: Path) -> None:
    done = keel(tmp_path, "config", "show", "run.yaml", "model.blocks=0", "mode.steps=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: run.yaml: 2 problems in the configuration",
        "  model.blocks: 0 must be greater than 0",
        "  mode: is unknown; did you mean the section model?",
    ]


@pytest.mark.parametrize("verb", [("config", "show"), ("train",), ("data", "build")])
def test_a_missing_file_is_one_message(tmp_path: Path, verb: tuple[str, ...]) -> None:
    done = keel(tmp_path, *verb, "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: none.yaml: 1 problem in the configuration",
        "  file: cannot be read: No such file or directory",
    ]


def test_one_rank_of_a_node_says_what_is_wrong(tmp_path: Path, config_file: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "keel_megatron",
        "config",
        "show",
        "run.yaml",
        "model.blocks=0",
    ]
    said = []
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0")):  # two of a node, one of another
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment(), "RANK": rank, "LOCAL_RANK": local},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        said.append(done.stderr)
    assert "model.blocks" in said[0]
    assert said[1] == ""
    assert said[2] == said[0]  # its file may be another one


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("configs",), "Did you mean 'config'?"),
        (("config", "show"), "Missing argument 'CONFIG'"),
        (("train", "--fast"), "No such option"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    done = keel(tmp_path, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    done = python(
        "import sys, keel_megatron.config.load as load, keel_megatron.cli.main as cli\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "load.load_config = interrupted\n"
        "sys.argv = ['keel', 'config', 'show', 'run.yaml']\n"
        "cli.main()\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_version_and_the_verbs(tmp_path: Path) -> None:
    assert keel(tmp_path, "--version").stdout == f"keel-megatron {__version__}\n"
    shown = keel(tmp_path, "--help").stdout
    for verb in ("train", "plan", "generate", "config", "data"):
        assert f"\n  {verb} " in shown


def test_the_command_starts_without_the_heavy_packages() -> None:
    done = python(
        "import sys, keel_megatron.cli.main\n"
        "heavy = {'torch', 'megatron', 'mlflow', 'numpy', 'lm_eval', 'datasets', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]")


def test_the_configuration_needs_no_torch() -> None:
    done = python("import sys, keel_megatron.config; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"
