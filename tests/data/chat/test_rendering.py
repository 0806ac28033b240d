"""Templates render as in transformers, and what counts is exactly what the assistant says."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.data.chat.rendering import Template, UnrenderableError
from keel_megatron.data.chat.templates import DEFAULT
from tests.data.chat.samples import (
    AGAIN,
    ANSWER,
    CHATML,
    CONVERSATIONS,
    MARKED,
    QUESTION,
    SYSTEM,
    YES,
    answers_of,
)

NAMES = {"eos_token": "</s>"}


def theirs(template: str, messages: Any, *, prompt: bool = False) -> tuple[str, list[str]]:
    """A conversation rendered by transformers, and its assistant's texts."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **NAMES,
    )
    return text, [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("template", [DEFAULT, MARKED], ids=["default", "chatml"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_text_and_answers_are_those_of_transformers(template: str, messages: Any) -> None:
    ours = Template(template, NAMES)
    parts = ours.parts(messages)
    text, answers = theirs(template, messages)
    assert "".join(part.text for part in parts) == text
    assert answers_of(parts) == answers
    prompt = ours.prompt(messages)
    assert "".join(part.text for part in prompt) == theirs(template, messages, prompt=True)[0]
    assert answers_of(prompt) == answers


def test_the_default_template() -> None:
    parts = Template(DEFAULT, NAMES).parts([SYSTEM, QUESTION, ANSWER, AGAIN, YES])
    assert [tuple(part) for part in parts] == [
        ("<|system|>\nCount.\n<|user|>\nHow many cats?\n<|assistant|>\n", False),
        ("Two cats.\n\nOr  three </s>", True),
        ("\n<|user|>\n  Sure?  \n<|assistant|>\n", False),
        ("Yes</s>", True),
    ]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_without_marks_the_answer_is_what_follows_its_prompt(messages: Any) -> None:
    parts = Template(CHATML, {}).parts(messages)
    assert "".join(part.text for part in parts) == theirs(CHATML, messages)[0]
    said = [m["content"] + "<|im_end|>\n" for m in messages if m["role"] == "assistant"]
    assert answers_of(parts) == said
    prompt = Template(CHATML, {}).prompt(messages)
    assert "".join(part.text for part in prompt) == theirs(CHATML, messages, prompt=True)[0]
    assert answers_of(prompt) == said


LAST_ONLY = "{% for m in messages %}{{ m.content if loop.last else m.content[:3] }}|{% endfor %}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LAST_ONLY, "the template changes earlier messages when one is added"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ messages[0]['content'] }}", "renders none of the assistant's text"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{% set n = namespace(__class__=1) %}", "cannot have the attribute '__class__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "cannot have the attribute '_x'"),
        (
            "{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}",
            "a {% generation %} block inside of another",
        ),
    ],
)
def test_refused(template: str, why: str) -> None:
    with pytest.raises(UnrenderableError) as error:
        Template(template, NAMES).parts([QUESTION, ANSWER, AGAIN, YES])
    assert why in str(error.value)


def test_no_template() -> None:
    with pytest.raises(UnrenderableError, match=r"unknown tag .*\(line 2 of the template\)"):
        Template("\n{% endfor %}", NAMES)
