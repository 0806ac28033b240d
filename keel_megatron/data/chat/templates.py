"""Where a chat template comes from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keel_megatron.config.reading import SMALL, parse_json, read_small, read_small_text
from keel_megatron.errors import UserError

FILE: Final = "chat_template.jinja"
"""Its name beside a tokenizer, in a dataset, a run, a checkpoint and a Hugging Face folder."""
_CONFIG: Final = "tokenizer_config.json"
DEFAULT: Final = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' }}
{%- generation %}
{{- message['content'] + eos_token }}
{%- endgeneration %}
{%- if not loop.last %}
{{- '\\n' }}
{%- endif %}
{%- else %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}
"""
"""That of Tulu 3 (arXiv 2411.15124): its role names are plain text, so it fits any vocabulary."""


@dataclass(frozen=True)
class TemplateFile:
    """A chat template."""

    text: str
    """It needs no variable but messages, add_generation_prompt and eos_token."""
    origin: str
    """Where it comes from, for messages."""

    @property
    def sha256(self) -> str:
        """Of its file."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_template(given: Path | None, tokenizer: Path | None) -> TemplateFile:
    """The template of a run's chat sources.

    Args:
        given: data.chat_template: a file.
        tokenizer: data.tokenizer, which may have one beside it: chat_template.jinja, or
            `chat_template` in tokenizer_config.json.

    Raises:
        UserError: it cannot be read.
    """
    default = TemplateFile(DEFAULT, "the default")
    folder = None if tokenizer is None else tokenizer if tokenizer.is_dir() else tokenizer.parent
    if given is not None:
        config = {} if folder is None else _config(folder / _CONFIG)
        return TemplateFile(_with_names(read_template(given), config), str(given))
    return default if folder is None else template_beside(folder) or default


def template_beside(folder: Path) -> TemplateFile | None:
    """The template in a tokenizer's folder, if there is one.

    Raises:
        UserError: it cannot be read.
    """
    config = _config(folder / _CONFIG)
    if (folder / FILE).is_file():
        text = read_template(folder / FILE)
        return TemplateFile(_with_names(text, config), str(folder / FILE))
    configured = _configured(config.get("chat_template"))
    if configured is None:
        return None
    return TemplateFile(_with_names(configured, config), str(folder / _CONFIG))


def read_template(path: Path) -> str:
    """The text of a template's file.

    Raises:
        UserError: it cannot be read, has more than 1 MiB, or is not UTF-8.
    """
    try:
        return read_small_text(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.chat_template: {path} cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.chat_template: {path} is not UTF-8 text") from error


def _config(path: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; nothing if there is none."""
    try:
        content = parse_json(read_small(path, 16 * SMALL))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _configured(found: Any) -> str | None:
    """The template in tokenizer_config.json: one, or the default one of a list."""
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and len(found) <= SMALL else None


def _with_names(text: str, config: dict[str, Any]) -> str:
    """The template with the special tokens that it uses, which only this folder knows.

    transformers takes them from tokenizer_config.json. The end of a document's is known anywhere.
    """
    lines = []
    for key, value in sorted(config.items()):
        name = value.get("content") if isinstance(value, dict) else value
        is_used = re.fullmatch(r"[a-z_]+_token", key) and re.search(rf"\b{key}\b", text)
        if is_used and key != "eos_token" and isinstance(name, str):
            quoted = name.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'{{% set {key} = "{quoted}" %}}\n')  # the line end is not rendered
    return "".join(lines) + text
