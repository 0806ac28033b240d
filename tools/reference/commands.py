"""The page of commands, from the command line's own parsers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from keel_megatron.cli.examples import EXAMPLES
from keel_megatron.cli.help import help_record
from keel_megatron.cli.main import app

HEAD = """\
# Commands

With `--help`, each command prints its part of this page. `[SECTION.KEY=VALUE]...` are settings that
replace those of the configuration file: [Settings](settings.md). See also
[Exit codes](exit-codes.md) and [The command line](../command-line.md): completion, JSON, colours.
"""


def page() -> str:
    """The page docs/reference/commands.md."""
    root = typer.main.get_command(app)
    described = [_described(command, words) for words, command in commands(root)]
    return "\n".join([HEAD, _index(root), *described])


def commands(root: Any, words: tuple[str, ...] = ("keel",)) -> Iterator[tuple[str, Any]]:
    """The commands without those that only group others, with what one types to call them."""
    for name, command in root.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


def _index(root: Any) -> str:
    lines = ["| command | |", "|---|---|"]
    for words, command in commands(root):
        lines.append(f"| [`{words}`](#{words.replace(' ', '-')}) | {_first(command)} |")
    return "\n".join(lines) + "\n"


def _first(command: Any) -> str:
    """The first sentence of a command's help."""
    return " ".join(inspect.cleandoc(command.help or "").partition("\n\n")[0].split())


def _described(command: Any, words: str) -> str:
    """A command's usage, its help and its parameters."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    usage = " ".join([words, *command.collect_usage_pieces(context)])
    parts = [f"## {words}\n", f"<!-- test: output -->\n```\n{usage}\n```\n"]
    parts += [f"{_text(text)}\n" for text in (command.help, command.epilog) if text]
    found = [one for one in command.params if "--help" not in one.opts]
    records = [help_record(one, context) for one in found]
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in filter(None, records)]
    if rows:
        parts.append("\n".join(["| | |", "|---|---|", *rows]) + "\n")
    examples = "\n".join(EXAMPLES[words.removeprefix("keel ")])
    parts.append(f"Examples:\n\n<!-- test: output -->\n```\n{examples}\n```\n")
    return "\n".join(parts)


def _text(text: str) -> str:
    """Help as Markdown: its paragraphs; what is indented is code there as well."""
    lines = inspect.cleandoc(text.replace("\b\n", "")).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
