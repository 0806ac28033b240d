"""A continuation's text, token by token, and where a stop text ends it."""

from __future__ import annotations

from typing import Protocol

_BEFORE = 8
"""Tokens of the prompt that are decoded with the first new ones: spaces depend on neighbours."""
_INCOMPLETE = "\ufffd"


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""


class Continuation:
    """The text that follows a prompt.

    A token may be a part of a character, and a text's end a part of a stop text: these are held
    back until it is known what they are.

    Args:
        tokenizer: decodes tokens.
        prompt: the prompt's tokens.
        stop: texts before which the continuation ends.

    Attributes:
        text: what is certain.
        stopped: whether a stop text was met.
    """

    def __init__(self, tokenizer: Decodes, prompt: list[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = prompt[-_BEFORE:]
        self._known = len(self._tokens)
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Append a token; returns the text that is certain now."""
        self._tokens.append(token)
        new = self._new_text()
        return "" if new.endswith(_INCOMPLETE) else self._accept(new, final=False)

    def finish(self) -> str:
        """The text that was held back; nothing follows."""
        return "" if self.stopped else self._accept(self._new_text(), final=True)

    def _new_text(self) -> str:
        """The text of the tokens whose text has not been taken."""
        known = self._tokenizer.decode(self._tokens[: self._known])
        return self._tokenizer.decode(self._tokens)[len(known) :]

    def _accept(self, new: str, *, final: bool) -> str:
        """Take new text; returns what is certain."""
        self._tokens = self._tokens[-_BEFORE:]
        self._known = len(self._tokens)
        found = self._held + new
        places = [place for text in self._stop if (place := found.find(text)) >= 0]
        certain = len(found) if final else len(found) - self._beginning(found)
        if places:
            self.stopped, certain = True, min(places)
        self._held = found[certain:]
        self.text += found[:certain]
        return found[:certain]

    def _beginning(self, found: str) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(found)), 0, -1):
            if any(text.startswith(found[-size:]) for text in self._stop):
                return size
        return 0
