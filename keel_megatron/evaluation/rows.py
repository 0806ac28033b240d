"""What is scored, and its score: tokens, and the log probabilities of the last of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A sequence whose last tokens are scored.

    Args:
        tokens: context and continuation, at least two; one more than the model's context at most.
        scored: tokens at the end that get a log probability, from 1 to len(tokens) - 1.
    """

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Score:
    """Of a row's scored tokens.

    Args:
        log_probabilities: of each, in nats, given all tokens before it.
        greedy: whether each is the model's most probable token.
    """

    log_probabilities: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """Log probability of the scored tokens together, in nats."""
        return sum(self.log_probabilities)
