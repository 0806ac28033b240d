"""How the next token is chosen, and when a text ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from keel_megatron.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    """0: greedy decoding."""
    top_p: float = 0.95
    """Nucleus sampling: probability mass to sample from."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts before which a continuation ends."""
    slide: bool = False
    """At the context's end, continue with the newest half of the context."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature: {self.temperature} must be a number of at least 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed: {self.seed} must be from 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: {self.top_p} must be above 0 and at most 1")
        if "" in self.stop:
            raise UserError("--stop: the text must not be empty")

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of prompt `number` (from 0), whatever prompts are beside it."""
        return torch.Generator().manual_seed((self.seed + number) % 2**63)


def not_finite(*, reported: bool) -> UserError:
    """The error of a model whose logits are not finite.

    Args:
        reported: whether another rank says so.
    """
    return UserError(
        "the model's logits are not finite: its training has diverged; use an earlier checkpoint",
        reported=reported,
    )


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token from logits [vocabulary], with temperature and nucleus sampling.

    Nucleus (top-p) sampling: Holtzman et al. 2020, arXiv 1904.09751.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In fp64 and below 0, since logits / temperature may overflow.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    probabilities = torch.softmax(scaled, dim=-1).to(logits.dtype)
    ordered, order = probabilities.sort(descending=True)
    # Keep tokens whose preceding cumulative probability is below top_p; the first one always stays.
    kept = ordered * ((ordered.cumsum(-1) - ordered) < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
