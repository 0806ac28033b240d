"""Records of conversations."""

from __future__ import annotations

import re
from typing import Any

import pytest

from keel_megatron.data.chat.messages import messages_of
from tests.data.chat.samples import ANSWER, QUESTION, SYSTEM


def test_null_keys_are_none() -> None:
    given = [{**QUESTION, "name": None, "tool_calls": None}, ANSWER]
    assert messages_of({"messages": given, "id": 3}, "messages") == [QUESTION, ANSWER]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ([], "is not a JSON object"),
        ({"conversations": []}, "has no key 'm' (its keys: 'conversations'); text_key names"),
        ({"m": "hello"}, "'m' is not a list of messages"),
        ({"m": []}, "'m' is not a list of messages"),
        ({"m": [SYSTEM, QUESTION]}, "'m' has no message of the assistant"),
        ({"m": [QUESTION, "hi"]}, "message 2 of 'm' is not an object with role and content"),
        ({"m": [{"role": "tool", "content": "x"}]}, "message 1 of 'm' has the role 'tool', not"),
        ({"m": [{"role": ["user"], "content": "x"}]}, "message 1 of 'm' has the role ['user']"),
        ({"m": [{"role": "user"}]}, "message 1 of 'm' has no text as its content"),
        ({"m": [{"role": "user", "content": [{}]}]}, "message 1 of 'm' has no text as its content"),
        ({"m": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair (U+D800)"),
        (
            {"m": [QUESTION, {**ANSWER, "tool_calls": [1]}]},
            "message 2 of 'm' has tool_calls; only role and content are supported",
        ),
    ],
)
def test_damaged(record: Any, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        messages_of(record, "m")
