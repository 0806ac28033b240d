"""`keel --help` and each command's: groups, examples that are right, whole lines."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from keel_megatron.cli.examples import EXAMPLES
from keel_megatron.cli.help import GROUPS
from keel_megatron.cli.main import app
from keel_megatron.config import RunConfig, load_config
from keel_megatron.studies import cost
from tests.docs.commands import ROOT

ROOT_COMMAND: Any = typer.main.get_command(app)


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its words after `keel`."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaves(child, (*words, name))
        else:
            yield " ".join((*words, name)), child


COMMANDS = dict(leaves(ROOT_COMMAND))
LINES = [line for examples in EXAMPLES.values() for line in examples]


def test_the_commands_are_grouped_and_each_is_described_in_a_line() -> None:
    shown = CliRunner().invoke(app, ["--help"], prog_name="keel", terminal_width=80).stdout
    titles = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert titles == ["Options", *GROUPS]
    described = re.findall(r"^  ([a-z][\w-]*) +\S.*\.$", shown, re.MULTILINE)
    assert sorted(described) == sorted(ROOT_COMMAND.commands)
    assert max(map(len, shown.splitlines())) <= 80
    assert CliRunner().invoke(app, []).output == CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_ends_with_examples(name: str) -> None:
    if name == "lm-eval":  # shows lm-eval's own
        return
    done = CliRunner().invoke(app, [*name.split(), "--help"], prog_name="keel")
    text, _, examples = done.stdout.partition("\nExamples:\n")
    assert [line.strip() for line in examples.splitlines()] == list(EXAMPLES[name])
    assert not re.search(r"Usage:.*{|<\w|\[required\]|list\[", text), "the parser's own notation"


def test_there_are_examples_of_commands_only() -> None:
    assert set(EXAMPLES) == set(COMMANDS)


def parsed(line: str) -> tuple[str, list[str], dict[str, Any]]:
    """The command of an example, its arguments, and their values as the command gets them.

    Raises:
        typer.BadParameter: a value is not valid.
    """
    words = shlex.split(re.split(r" >>? ", line)[0])
    words = words[words.index("keel_megatron") if words[0] == "torchrun" else 0 :][1:]
    command, path = ROOT_COMMAND, []
    while hasattr(command, "commands"):
        path.append(words.pop(0))
        command = command.commands[path[-1]]
    return " ".join(path), words, command.make_context("keel", list(words)).params


def checkpoint_steps(config: RunConfig, name: str) -> range:
    """The steps of which a run has a checkpoint; for `keel depth`, a profile."""
    if name == "depth":
        return range(0, config.training.steps + 1, config.tracking.depth_every)
    every, kept = config.checkpoint.every, config.checkpoint.keep
    return range(0, config.training.steps + 1, every)[-kept:]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with yaml/, into which a study may write."""
    (tmp_path / "yaml").symlink_to(ROOT / "yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("line", LINES)
def test_an_example_is_right(line: str) -> None:
    """Its options and their values are valid, and so are the configuration and the step."""
    name, _words, values = parsed(line)
    config = values.get("config")
    if config is not None and str(config) != "CONFIG":
        given = list(values.get("overrides") or ())
        load_config(config, given)
        if values.get("compare") is not None:
            key, _equals, compared = values["compare"].partition("=")
            for value in compared.split(","):
                load_config(config, [*given, f"{key}={value}"])
    if "runs/demo" in line and values.get("step") is not None:
        assert values["step"] in checkpoint_steps(load_config("yaml/demo.yaml"), name)
    if name == "data task":
        assert 0 <= values["task"] < values["tasks"]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("keel study ")])
def test_an_example_of_a_study_has_a_grid(
    line: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, words, values = parsed(line)
    if "plan" not in values:  # no grid of runs
        return
    monkeypatch.setattr(cost, "_ask", lambda runs, _gpu: ([cost.Times(1.0, 2.0)] * len(runs), ""))
    small = ["--documents", "5", "--questions", "5"] if "documents" in values else []
    done = CliRunner().invoke(app, [*name.split(), *words, "--plan", *small])
    assert done.exit_code == 0, done.output or done.exception


def test_examples_name_tasks_of_lm_eval() -> None:
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("needs lm-eval")
    folder = Path(found.origin).parent / "tasks"
    for line in EXAMPLES["evaluate"]:
        for task in (parsed(line)[2]["tasks"] or "").split(","):
            assert not task or any(folder.glob(f"*/{task}.yaml")), task


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("keel study depth-tasks demo --tasks hops,copy", "'copy' must be one of hops, "),
        ("keel study alpha demo --scale half", "'half' must be one of one, sqrt, L/4"),
        ("keel study alpha demo --rules keel --rules kel", "'kel' must be one of keel, pre_ln"),
        ("keel study optimizers demo --optimizers sgd", "'sgd' must be one of adamw, muon"),
        ("keel study stream-precision demo --streams fp16", "'fp16' must be one of fp32, bf16"),
        ("keel study gradient-flow --rules kel", "'kel' must be one of keel, "),
        ("keel plan demo --gpu v100", "'v100' must be one of h200, "),
        ("keel depth runs/demo --quantity grad", "'grad' must be one of gradient_norm, "),
        ("keel config copy dmo", "'dmo' must be one of demo, "),
        ("keel train demo --processes two", "'two' must be a whole number"),
        ("keel train demo --processes -1", "'-1' must be at least 0"),
        ("keel generate runs/demo --top-p x", "'x' must be a number"),
        ("keel data build demo --executor slrm", "'slrm' is not one of 'local', 'slurm'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(line: str, expected: str) -> None:
    with pytest.raises(typer.BadParameter) as raised:
        parsed(line)
    assert raised.value.message.startswith(expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_usage_line_has_no_braces(name: str) -> None:
    command = COMMANDS[name]
    pieces = command.collect_usage_pieces(command.make_context("keel", [], resilient_parsing=True))
    assert not re.search("[{}<>]", " ".join(pieces))
