"""`keel --help` and each command's: groups, examples that work, whole lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from keel_megatron.cli.examples import EXAMPLES
from keel_megatron.cli.help import GROUPS
from keel_megatron.cli.main import app
from keel_megatron.config import load_config
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


@pytest.mark.parametrize("line", LINES)
def test_an_example_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.split(r" >>? ", line)[0])
    words = words[words.index("keel_megatron") if words[0] == "torchrun" else 0 :][1:]
    command: Any = ROOT_COMMAND
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context("keel", words)
    config = context.params.get("config")
    if config is not None and str(config) != "CONFIG":
        load_config(config, context.params.get("overrides") or ())
