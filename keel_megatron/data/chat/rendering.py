"""Renders conversations with a chat template, as transformers does. Imports Jinja2 alone.

A template may come from a stranger with a tokenizer, so it is rendered in Jinja2's sandbox with
immutable objects, and only by `data/chat/renderer.py`, in a process with limits.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Messages = Sequence[Mapping[str, str]]
"""Each with `role` and `content`."""
ASSISTANT = "assistant"


class Part(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    counts: bool
    """Whether the assistant says it, so that its tokens count in the loss."""


class UnrenderableError(ValueError):
    """A conversation that the template does not render; the message says why."""


class Template:
    """A chat template.

    The assistant's text is what is inside of `{% generation %}` blocks. In a template without them
    it is what an assistant's message adds to the text so far and its generation prompt.

    Args:
        text: the template.
        names: variables of the template, such as eos_token.

    Raises:
        UnrenderableError: the text is not a template.
    """

    def __init__(self, text: str, names: Mapping[str, str]) -> None:
        self._names = names
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals = {
            "range": environment.globals["range"],
            "dict": _dict,
            "namespace": _PlainNamespace,
            "raise_exception": _raise_exception,
        }
        try:
            self._template = environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise UnrenderableError(_reason(error)) from error
        generation = environment.extensions[_Generation.identifier]
        assert isinstance(generation, _Generation)
        self._is_marked = generation.is_used

    def parts(self, messages: Messages) -> list[Part]:
        """A whole conversation. The texts of its parts, joined, are the rendered text.

        Raises:
            UnrenderableError: the template refuses it, or does not show what the assistant says.
        """
        found = self._marked(messages) if self._is_marked else self._by_prefixes(messages)
        joined: list[Part] = []
        for part in found:
            if joined and joined[-1].counts == part.counts:
                joined[-1] = Part(joined[-1].text + part.text, part.counts)
            elif part.text:
                joined.append(part)
        if not any(part.counts for part in joined):
            raise UnrenderableError("the template renders none of the assistant's text")
        return joined

    def prompt(self, messages: Messages) -> list[Part]:
        """A conversation up to the place where the assistant's answer begins.

        Raises:
            UnrenderableError: the template refuses it.
        """
        if self._is_marked:
            found = self._marked(messages, prompt=True)
        else:
            whole = self._render(messages, prompt=True, mark="")
            answers = [n for n, message in enumerate(messages, 1) if _is_assistant(message)]
            found = self.parts(messages[: answers[-1]]) if answers else []
            done = "".join(part.text for part in found)
            if not whole.startswith(done):
                raise UnrenderableError(_REWRITES)
            found = [*found, Part(whole[len(done) :], False)]
        return [part for part in found if part.text]

    def _marked(self, messages: Messages, *, prompt: bool = False) -> list[Part]:
        """The parts of a template with `{% generation %}` blocks."""
        mark = secrets.token_hex(16)  # no message has it
        pieces = re.split(f"{mark}([<>])", self._render(messages, prompt=prompt, mark=mark))
        if "".join(pieces[1::2]) != "<>" * (len(pieces) // 4):
            raise UnrenderableError("the template has a {% generation %} block inside of another")
        return [Part(text, counts=number % 2 == 1) for number, text in enumerate(pieces[::2])]

    def _by_prefixes(self, messages: Messages) -> list[Part]:
        """The parts of another template: each answer follows the prompt before it."""
        found: list[Part] = []
        done = ""
        for number, message in enumerate(messages):
            if not _is_assistant(message):
                continue
            before = self._render(messages[:number], prompt=True, mark="")
            after = self._render(messages[: number + 1], prompt=False, mark="")
            if not before.startswith(done) or not after.startswith(before):
                raise UnrenderableError(_REWRITES)
            found += [Part(before[len(done) :], False), Part(after[len(before) :], True)]
            done = after
        whole = self._render(messages, prompt=False, mark="")
        if not whole.startswith(done):
            raise UnrenderableError(_REWRITES)
        return [*found, Part(whole[len(done) :], False)]

    def _render(self, messages: Messages, *, prompt: bool, mark: str) -> str:
        try:
            return self._template.render(
                **self._names,
                **{_MARK: mark},
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever the template's operations raise
            raise UnrenderableError(_reason(error)) from error


_MARK = "keel_mark"
_REWRITES = (
    "the template changes earlier messages when one is added, so it does not show which text is "
    "the assistant's; put that text into {% generation %} ... {% endgeneration %} in the template"
)


class _Generation(Extension):
    """The block `{% generation %}` of transformers, whose content the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.is_used = False

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse one block."""
        self.is_used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_between_marks", [nodes.Name(_MARK, "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _between_marks(self, mark: str, caller: Callable[[], str]) -> str:
        return f"{mark}<{caller()}{mark}>"


def _is_assistant(message: Mapping[str, str]) -> bool:
    return message["role"] == ASSISTANT


class _PlainNamespace(Namespace):
    """Jinja2's namespace without attributes of Python's own, with which a sandbox can be left."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = dict(*args, **kwargs)
        for name in names:
            _check_attribute(name)
        super().__init__(names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """A new dictionary; a function, because a class has attributes."""
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` as transformers has it, which keeps characters as they are."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    """Called by templates that refuse a conversation."""
    raise TemplateError(message)


def _reason(error: BaseException) -> str:
    """The first line of an error in a template."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    line = getattr(error, "lineno", None)
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300] + (f" (line {line} of the template)" if line else "")
