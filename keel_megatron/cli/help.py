"""How the commands show their help: grouped, with examples, without the parser's own notation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperCommand, TyperGroup

from keel_megatron.cli.examples import EXAMPLES

TRAIN, WATCH, DATA = "Train", "Watch", "Data"
USE, SAVED, STUDIES, MACHINE = "Use a model", "Saved state", "Studies", "This machine"
GROUPS = (TRAIN, WATCH, DATA, USE, SAVED, STUDIES, MACHINE)
"""What people do, in the order of `keel --help`."""
_TYPES = {
    "int": "N",
    "int range": "N",
    "float": "NUMBER",
    "float range": "NUMBER",
    "path": "PATH",
    "str": "TEXT",
}
"""What stands for a value, by the parser's name of its type."""

_WANTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
"""What would be valid, by the kind of pydantic's error, by which typer reads values."""


class Command(TyperCommand):
    """A command of `keel`: its help ends with examples."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage line; a required argument without braces."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's; an invalid value is named and said in plain words."""
        try:
            return list(super().parse_args(ctx, args))
        except typer.BadParameter as error:
            error.message = _plain(error)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments by their names, options with a word for their value."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            of_kind = [one for one in self.get_params(ctx) if one.param_type_name == kind]
            records = [help_record(one, ctx) for one in of_kind]
            found = [record for record in records if record is not None]
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, which are not wrapped."""
        examples = EXAMPLES.get(_path(ctx), ())
        if examples:
            with formatter.section("Examples"):
                formatter.write_text("\n".join(["\b", *examples]))


class App(typer.Typer):
    """`keel`, or a command with commands of its own."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("cls", Group)
        super().__init__(no_args_is_help=True, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        """As typer's, of class `Command`."""
        return super().command(name, cls=Command, **options)


class Group(TyperGroup):
    """A command with commands of its own, such as `keel data`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """All commands, by group if they have one."""
        shown = [name for name in self.list_commands(ctx) if not self.commands[name].hidden]
        given = {name: getattr(self.commands[name], "rich_help_panel", None) for name in shown}
        panels = {name: group if group in GROUPS else None for name, group in given.items()}
        width = max(map(len, shown))
        for title in [*GROUPS, None]:
            names = [name for name in shown if panels[name] == title]
            rows = [(name.ljust(width), _first_sentence(self.commands[name])) for name in names]
            if rows:
                with formatter.section(title or "Commands"):
                    formatter.write_dl(rows)


def _path(ctx: Any) -> str:
    """The command's words after `keel`."""
    words: list[str] = []
    while ctx.parent is not None:
        words.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return " ".join(words)


def help_record(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """A parameter's name and help without the parser's notation; None: it is hidden."""
    record = parameter.get_help_record(ctx)
    if record is None:
        return None
    name, text = record
    name = re.sub(r" <list\[.*\]>$|(?<=^[A-Z]) <.*>$", "", name)
    if not name.startswith("-"):
        name = re.sub(r" <[\w ]+>$", "", name)
    name = re.sub(r"<([\w ]+)>", lambda found: _TYPES.get(found[1], found[1]), name)
    name = re.sub(r"<([\w|-]+)>", r"\1", name)
    text = re.sub(r"\s*\[required\]", "", text)
    text = re.sub(r"(?<=[;\[])\s*x>=\d+(?=\])|; x>=\d+", "", text).replace("  []", "")
    return name, text


def _plain(error: typer.BadParameter) -> str:
    """The message of an invalid value: the value, and what would be valid."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return error.message
    found = cause.errors()[0]
    wanted = _WANTED.get(found["type"])
    if wanted is None:
        return error.message.removeprefix("Value error, ")
    return f"{found['input']!r} must be {wanted.format(**found.get('ctx', {}))}"


def _first_sentence(command: Any) -> str:
    return str(command.get_short_help_str(limit=300))
