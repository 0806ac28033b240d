"""Files of prompts and of their continuations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from keel_megatron.errors import UserError

if TYPE_CHECKING:  # prompts are read without torch
    from keel_megatron.inference.generate import Completion


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or of a .jsonl file strings or objects with a `prompt`.

    Raises:
        UserError: the file cannot be read, is empty, or a line is not a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--prompts: {path} cannot be read: {reason}") from error
    if path.suffix == ".jsonl":
        lines = [_prompt(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts: {path} has no prompts; write one a line")
    return lines


def _prompt(path: Path, number: int, line: str) -> str:
    """The prompt of a line of JSON."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise UserError(
            f'--prompts: line {number} of {path} must be a string or {{"prompt": TEXT}}, as JSON'
        )
    return prompt


def json_lines(completions: Sequence[Completion]) -> str:
    """Completions, a JSON object a line."""
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in completions)
