"""Where a text can be cut without changing its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import SPACE_MARK, Tokenizer
from keel_megatron.data.tokenizer_json import NoEquivalentError, normal_pieces

PIECE_CHARACTERS = 1 << 17
"""A document is encoded in pieces of at most about this many characters."""
_TRIED, _TRIED_CHARACTERS = 256, 2048


class Cuts(Protocol):
    """Knows where texts can be cut."""

    is_proven: bool
    """Whether a cut at a place that `is_safe` accepts leaves the tokens unchanged."""

    def is_safe(self, before: str, after: str) -> bool:
        """Whether a text can be cut between two characters."""


class PairCuts:
    """Cuts for BPE models that merge across all text, as SentencePiece's.

    A token spans a place only if the two characters beside it are neighbours in a piece.
    """

    is_proven = True

    def __init__(self, pieces: Iterable[str]) -> None:
        self._joined = {piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1)}

    def is_safe(self, before: str, after: str) -> bool:
        """Whether no piece spans the place between two characters."""
        # Text is encoded on both sides of a space mark separately anyway (`Tokenizer.encode`).
        return before + after not in self._joined or SPACE_MARK in (before, after)


class WordCuts:
    """Cuts before the space of a word, for tokenizers that split a text into words first."""

    is_proven = True

    def is_safe(self, before: str, after: str) -> bool:
        """Whether a word ends here and a space follows."""
        return before.isascii() and before.isalnum() and after == " "

    def work(self, tokenizer: HuggingFaceTokenizer, sample: Iterable[str]) -> bool:
        """Whether cuts leave the tokens of a sample's texts unchanged, at least of one text."""
        tried = 0
        for text in sample:
            text = text[:_TRIED_CHARACTERS]
            places = [at for at in range(1, len(text)) if self.is_safe(text[at - 1], text[at])]
            if not places:
                continue
            ends = zip([0, *places], [*places, len(text)], strict=True)
            tokens = [token for a, b in ends for token in tokenizer.encode(text[a:b])]
            if tokens != tokenizer.encode(text):
                return False
            tried += 1
            if tried >= _TRIED:
                break
        return tried > 0


class NoCuts:
    """For tokenizers of which nothing is known."""

    is_proven = False

    def is_safe(self, before: str, after: str) -> bool:  # noqa: ARG002
        """False."""
        return False


def cuts_of(
    tokenizer: Tokenizer | HuggingFaceTokenizer,
    sample: Iterable[str] = (),
    *,
    proven: bool | None = None,
) -> Cuts:
    """The cuts for a tokenizer.

    Args:
        tokenizer: the tokenizer.
        sample: texts on which the cuts for a foreign tokenizer are tried.
        proven: the result of an earlier call, `is_proven`; then nothing is tried.
    """
    if proven is False:
        return NoCuts()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        words = WordCuts()
        return words if proven or words.work(tokenizer, sample) else NoCuts()
    try:
        return PairCuts(normal_pieces(read_small(tokenizer.path, LARGE)))
    except NoEquivalentError:
        return NoCuts()


def last_safe(cuts: Cuts, text: str, at: int, start: int) -> int | None:
    """The last place from `start` (exclusive) up to `at` where a text can be cut; None: nowhere."""
    for place in range(min(at, len(text) - 1), start, -1):
        if cuts.is_safe(text[place - 1], text[place]):
            return place
    return None


def first_safe(cuts: Cuts, text: str, start: int, stop: int) -> int | None:
    """The first place after `start` and before `stop` where a text can be cut; None: nowhere."""
    for place in range(start + 1, min(stop, len(text))):
        if cuts.is_safe(text[place - 1], text[place]):
            return place
    return None


class Pieces:
    """Cuts texts into pieces that are encoded one by one.

    Args:
        cuts: where texts can be cut.
        limit: characters of a piece; without a safe place, a piece has up to eight times as many.

    Attributes:
        unsafe: number of cuts at places that are not safe.
    """

    def __init__(self, cuts: Cuts, limit: int = PIECE_CHARACTERS) -> None:
        self._cuts = cuts
        self._limit = limit
        self.unsafe = 0

    def of(self, chunks: Iterable[str]) -> Iterator[str]:
        """The pieces of a document, which joined are its text."""
        text = ""
        for chunk in chunks:
            text += chunk
            start = 0
            while len(text) - start > self._limit:
                at = self._place(text, start)
                if at is None:
                    break
                yield text[start:at]
                start = at
            text = text[start:]
        if text:
            yield text

    def _place(self, text: str, start: int) -> int | None:
        """Where the piece that begins at `start` ends; None: more text is needed to decide."""
        nearest, farthest = start + self._limit, start + 8 * self._limit
        at = last_safe(self._cuts, text, nearest, start)
        if at is None:
            at = first_safe(self._cuts, text, nearest, farthest)
        if at is None and len(text) > farthest:
            self.unsafe += 1
            return farthest
        return at
