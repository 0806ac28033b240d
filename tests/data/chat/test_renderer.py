"""A template cannot take endless time or memory."""

from __future__ import annotations

import pytest

from keel_megatron.data.chat import renderer
from keel_megatron.data.chat.renderer import Renderer
from keel_megatron.data.chat.rendering import Template, UnrenderableError
from keel_megatron.data.chat.templates import DEFAULT
from keel_megatron.errors import UserError
from tests.data.chat.samples import AGAIN, ANSWER, QUESTION, SYSTEM, YES

MESSAGES = [SYSTEM, QUESTION, ANSWER, AGAIN, YES]
LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}"
)


def test_a_process_renders_as_this_one() -> None:
    names = {"eos_token": "</s>"}
    here = Template(DEFAULT, names)
    with Renderer(DEFAULT, names, "it") as there:
        assert there.parts(MESSAGES) == here.parts(MESSAGES)
        with pytest.raises(UnrenderableError, match="none of the assistant's text"):
            there.parts([QUESTION])
        assert there.prompt(MESSAGES[:2]) == here.prompt(MESSAGES[:2])
        process = there._process
    assert process.poll() is not None


@pytest.mark.security
@pytest.mark.parametrize(
    ("template", "setting", "value", "why"),
    [
        (LOOP, "SECONDS", 0.5, "takes more than 0.5 s of processor time"),
        (DOUBLED, "MEMORY", 200 << 20, "needs more than 200 MiB of memory"),
    ],
    ids=["time", "memory"],
)
def test_limits(
    monkeypatch: pytest.MonkeyPatch, template: str, setting: str, value: float, why: str
) -> None:
    monkeypatch.setattr(renderer, setting, value)
    with (
        Renderer(template, {}, "a/chat_template.jinja") as there,
        pytest.raises(UserError) as error,
    ):
        there.parts(MESSAGES)
    assert str(error.value) == (
        f"data.chat_template: a/chat_template.jinja cannot be used: it {why} for a conversation"
    )


def test_no_template() -> None:
    with pytest.raises(UserError, match=r"data.chat_template: it is not a template: .*\(line 1 of"):
        Renderer("{% if %}", {}, "it")
