"""Conversations and chat templates for tests."""

from __future__ import annotations

from typing import Any

Messages = list[dict[str, str]]

QUESTION = {"role": "user", "content": "How many cats?"}
ANSWER = {"role": "assistant", "content": "Two cats.\n\nOr  three "}
SYSTEM = {"role": "system", "content": "Count."}
AGAIN = {"role": "user", "content": "  Sure?  "}
YES = {"role": "assistant", "content": "Yes"}

CONVERSATIONS: list[Messages] = [
    [QUESTION, ANSWER],
    [SYSTEM, QUESTION, ANSWER, AGAIN, YES],
    [QUESTION, ANSWER, YES],
    [QUESTION, ANSWER, AGAIN],
    [ANSWER],
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {% generation %}
        {{- message['content'] | trim + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


def answers_of(parts: list[Any]) -> list[str]:
    """The texts of the parts that count."""
    return [text for text, counts in parts if counts]


def with_chatml(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with ChatML's special tokens."""
    size = 1 + max(
        *tokenizer["model"]["vocab"].values(), *(one["id"] for one in tokenizer["added_tokens"])
    )
    added = [
        {**tokenizer["added_tokens"][0], "id": size + number, "content": name}
        for number, name in enumerate(("<|im_start|>", "<|im_end|>"))
    ]
    return {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], *added]}
