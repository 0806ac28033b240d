"""Files of prompts and of their continuations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from keel_megatron.config.reading import parse_json
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_output

if TYPE_CHECKING:  # prompts are read without torch
    from keel_megatron.inference.generate import Completion


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or of a .jsonl file strings or objects with a `prompt`.

    Lines end with LF or CRLF; empty ones are no prompts. A byte order mark is left out.

    Raises:
        UserError: the file cannot be read, is empty, or a line is not a prompt.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--prompts: {path} cannot be read: {reason}") from error
    # Not splitlines(): a string of JSON may hold other line separators, such as U+2028.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        found = [_prompt(path, n, line) for n, line in numbered]
    else:
        found = [line for _n, line in numbered]
    if not found:
        raise UserError(f"--prompts: {path} has no prompts; write one per line")
    return found


def _prompt(path: Path, number: int, line: str) -> str:
    """The prompt of a line of JSON."""
    try:
        found = parse_json(line)
        prompt = found.get("prompt") if isinstance(found, dict) else found
        if isinstance(prompt, str):
            prompt.encode()  # JSON can name half of a pair of surrogates, which is no text
            return prompt
    except ValueError:
        pass
    raise UserError(
        f'--prompts: line {number} of {path} must be a string or {{"prompt": TEXT}}, as JSON'
    )


def json_lines(completions: Sequence[Completion], *, ascii_only: bool = True) -> str:
    """Completions, a JSON object a line.

    Args:
        completions: the completions.
        ascii_only: escape other characters as JSON does: a console would escape what it cannot show
            in a way that is not JSON.
    """
    return "".join(json.dumps(asdict(one), ensure_ascii=ascii_only) + "\n" for one in completions)


def write_out(out: Path, completions: Sequence[Completion]) -> None:
    """Write the file of `--out` as a whole, in the place of an earlier one.

    Raises:
        UserError: it cannot be written; then the lines are printed, so that they are not lost.
    """
    lines = json_lines(completions, ascii_only=False)
    try:
        write_output("--out", out, lines)
    except UserError as error:
        print(json_lines(completions), end="", flush=True)
        raise UserError(f"{error}; its lines are printed instead") from error
