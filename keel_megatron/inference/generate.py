"""Generate text from a trained run: load a checkpoint in one process and sample."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keel_megatron.errors import UserError
from keel_megatron.inference.source import config_of, load
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start


@dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    """0: greedy decoding."""
    top_p: float = 0.95
    """Nucleus sampling: probability mass to sample from."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature: {self.temperature} must be a number of at least 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed: {self.seed} must be from 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: {self.top_p} must be above 0 and at most 1")


def generate_from_run(
    run: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Generate a continuation of a prompt; returns the prompt and the continuation.

    The context is the last data.seq_length tokens; a prompt may be longer.

    Args:
        run: folder of a run, for its newest valid checkpoint, or of a checkpoint.
        prompt: the text to continue.
        max_new_tokens: see `Sampling`.
        temperature: see `Sampling`.
        top_p: see `Sampling`.
        seed: see `Sampling`.

    Raises:
        UserError: the folder holds no run or no checkpoint, or a sampling setting is out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    config = config_of(run)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        source = load(run, config, runtime)
        for remark in source.remarks:
            print(remark, file=sys.stderr)
        tokenizer, context = source.tokenizer, config.data.seq_length
        tokens = tokenizer.encode(prompt) or [tokenizer.eod]
        if len(tokens) > context:
            print(
                f"--prompt: of its {len(tokens)} tokens the model sees the last {context} "
                "(data.seq_length)",
                file=sys.stderr,
            )

        @torch.inference_mode()
        def next_logits(tokens: list[int]) -> Tensor:
            row = torch.tensor([tokens[-context:]], device=runtime.device)
            positions = torch.arange(row.shape[1], device=runtime.device)[None]
            return source.model(row, positions, None)[0, -1].float()

        return tokenizer.decode(continue_tokens(tokens, tokenizer.eod, sampling, next_logits))


def continue_tokens(
    tokens: list[int],
    eod: int,
    sampling: Sampling,
    next_logits: Callable[[list[int]], Tensor],
) -> list[int]:
    """Append up to `max_new_tokens` tokens, stopping at the end of a document.

    Args:
        tokens: the prompt's tokens.
        eod: the token that ends a document; not appended.
        sampling: the sampling settings.
        next_logits: returns the logits [vocabulary] after a list of tokens.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(tokens)
    for _ in range(sampling.max_new_tokens):
        token = choose(next_logits(tokens).cpu(), sampling, generator)
        if token == eod:
            break
        tokens.append(token)
    return tokens


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token from logits [vocabulary], with temperature and nucleus sampling.

    Nucleus (top-p) sampling: Holtzman et al. 2020, arXiv 1904.09751.
    """
    if not logits.isfinite().all():
        raise UserError(
            "the model's logits are not finite: its training has diverged; use an earlier "
            "checkpoint, RUN/checkpoints/step_NNNNNNNN"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    # Keep tokens whose preceding cumulative probability is below top_p; the first one always stays.
    kept = ordered * ((ordered.cumsum(-1) - ordered) < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
