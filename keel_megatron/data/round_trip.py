"""What a tokenizer loses of a text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter


class RoundTrip(ABC):
    """A tokenizer that can be tested by encoding and decoding.

    Attributes:
        unknown: the token of unknown text; -1: there is none.
    """

    unknown: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode a text."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Decode tokens; the end of a document is empty."""

    def lost(self, text: str, tokens: list[int] | None = None) -> int:
        """Number of characters that encoding and decoding lose.

        Args:
            text: the text.
            tokens: its tokens, if they are known.
        """
        tokens = self.encode(text) if tokens is None else tokens
        decoded = self.decode([token for token in tokens if token != self.unknown])
        return 0 if decoded == text else (Counter(text) - Counter(decoded)).total()

    def losses(self) -> list[str]:
        """Reasons why encoding may be lossy, found by testing."""
        return [reason for probe, reason in _PROBES if self.lost(probe)]


_PROBES = (
    ("a\nb\tc", "it drops line ends or tabs"),
    ("a  b   c", "it merges white space (remove_extra_whitespaces)"),
    ("\uff21\ufb01", "it normalises characters (normalization_rule_name)"),
    ("\U0001f9ff\u0d9e", "it has no byte fallback: unknown characters become <unk>"),
)
