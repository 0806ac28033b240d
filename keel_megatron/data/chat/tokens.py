"""The tokens of a conversation, and which of them count in the loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from keel_megatron.data.chat.messages import check_names
from keel_megatron.data.chat.renderer import Renderer
from keel_megatron.data.chat.rendering import Messages, Part
from keel_megatron.data.chat.templates import FILE, read_template
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError

_JOINED = (("a", "b"), ("a\n", "b"), ("a ", "b"), ("a", " b"))


class ChatTokenizer:
    """Encodes conversations with a template; a context manager.

    The assistant's text and what is between is encoded separately: the model answers a prompt that
    is encoded without the answer.

    Args:
        tokenizer: the tokenizer.
        template: a chat template.
        origin: where it comes from, for messages.

    Raises:
        UserError: it is not a template, or the tokenizer puts something between parts of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer | HuggingFaceTokenizer, template: str, origin: str
    ) -> None:
        self._tokenizer = tokenizer
        _check_joins(tokenizer)
        names = {"eos_token": tokenizer.eod_name}
        self._renderer = Renderer(template, names, origin)

    def encode(self, messages: Messages) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens of a conversation, and for each whether it counts: int64 and bool [tokens].

        The last token is the end of a document; if the template does not end with it, it is added
        and does not count. The first token never counts: nothing is before it.

        Raises:
            ValueError: the template does not render the conversation, or a message contains the
                name of a special token.
        """
        check_names(messages, self._tokenizer.special_names)
        parts = self._renderer.parts(messages)
        encoded = [self._tokenizer.encode_special(part.text) for part in parts]
        tokens = [token for piece in encoded for token in piece]
        counts = [part.counts for part, p in zip(parts, encoded, strict=True) for _ in p]
        if tokens[-1:] != [self._tokenizer.eod]:
            tokens.append(self._tokenizer.eod)
            counts.append(False)
        if not any(counts[1:]):
            raise ValueError("only the first token is the assistant's, and it is not predicted")
        counts[0] = False
        return np.array(tokens, dtype=np.int64), np.array(counts, dtype=np.bool_)

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens of a conversation up to the place where the assistant's answer begins.

        Raises:
            ValueError: as in `encode`.
        """
        check_names(messages, self._tokenizer.special_names)
        return self._tokens(self._renderer.prompt(messages))

    def ends(self) -> list[int]:
        """The tokens that end an answer: of a document, and of an answer if that is another one."""
        question = {"role": "user", "content": "a"}
        tokens, counts = self.encode([question, {"role": "assistant", "content": "b"}])
        special = set(self._tokenizer.special_names.values())
        answer = [token for token in tokens[counts].tolist() if token in special]
        return list(dict.fromkeys([self._tokenizer.eod, *answer[-1:]]))

    def close(self) -> None:
        """End the renderer's process."""
        self._renderer.close()

    def _tokens(self, parts: Iterable[Part]) -> list[int]:
        return [token for part in parts for token in self._tokenizer.encode_special(part.text)]

    def __enter__(self) -> ChatTokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_chat(tokenizer: Tokenizer | HuggingFaceTokenizer, folder: Path) -> ChatTokenizer:
    """With the template that is kept with a tokenizer in a dataset, run, checkpoint or folder.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    return ChatTokenizer(tokenizer, read_template(folder / FILE), str(folder / FILE))


def _check_joins(tokenizer: Tokenizer | HuggingFaceTokenizer) -> None:
    """Refuse a tokenizer with which texts that are encoded in parts are changed.

    Raises:
        UserError: it puts a space before every text, or does not tell parts from a whole.
    """
    for left, right in _JOINED:
        decoded = tokenizer.decode(tokenizer.encode(left) + tokenizer.encode(right))
        if decoded != left + right:
            raise UserError(
                f"data.tokenizer: {tokenizer.path} cannot encode conversations: {left!r} and "
                f"{right!r} are decoded as {decoded!r}; use one that adds no space before a text "
                "(add_dummy_prefix: false)"
            )
