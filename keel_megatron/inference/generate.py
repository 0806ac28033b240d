"""Generate text from a trained run: load its newest checkpoint in one process and sample."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from keel_megatron.checkpoint import state
from keel_megatron.checkpoint.find import newest_good
from keel_megatron.checkpoint.identity import saved_config
from keel_megatron.config.errors import UserError
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.data.prepare import prepare
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    """0 = always the likeliest token."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that hold this probability together."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: {self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise UserError(f"--temperature: {self.temperature} must not be negative")
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
    """The prompt and its continuation by the newest checkpoint of a run's folder.

    Raises:
        UserError: the folder holds no run or no checkpoint, the prompt does not fit, or a
            sampling setting is out of range.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    with _loaded(run) as (config, tokenizer, next_logits):
        tokens = tokenizer.encode(prompt) or [tokenizer.eod]
        room = config.data.seq_length - len(tokens)
        if room < 1:
            raise UserError(
                f"--prompt: {len(tokens)} tokens leave no room in sequences of "
                f"data.seq_length = {config.data.seq_length}"
            )
        if sampling.max_new_tokens > room:
            raise UserError(
                f"--max-new-tokens: {sampling.max_new_tokens} after a prompt of {len(tokens)} "
                f"tokens exceed data.seq_length = {config.data.seq_length}; at most {room} fit"
            )
        return tokenizer.decode(continue_tokens(tokens, tokenizer.eod, sampling, next_logits))


@contextmanager
def _loaded(run: Path) -> Iterator[tuple[RunConfig, Tokenizer, Callable[[list[int]], Tensor]]]:
    """The run's configuration, tokenizer and next-token logits, in this process alone."""
    config = saved_config(run)
    alone = config.model_copy(
        update={
            "parallel": ParallelConfig(timeout_seconds=config.parallel.timeout_seconds),
            "training": config.training.model_copy(update={"threads": 0}),
        }
    )
    with start(alone.parallel, alone.training, Launch(0, 1, 0, 1)) as runtime:
        newest = newest_good(run, runtime)
        if newest.path is None:
            raise UserError(f"{run} has no complete checkpoint yet; train it first")
        for remark in newest.remarks:
            print(remark, file=sys.stderr)
        data = prepare(alone, lambda _text: None, newest.state.get("data"))
        (chunk,) = build_model(alone, runtime)
        state.load_weights(newest.path, runtime, [chunk])
        chunk.eval()

        @torch.inference_mode()
        def next_logits(tokens: list[int]) -> Tensor:
            row = torch.tensor([tokens], device=runtime.device)
            positions = torch.arange(len(tokens), device=runtime.device)[None]
            return chunk(row, positions, None)[0, -1].float()

        yield config, Tokenizer(data.tokenizer_path), next_logits


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
        sampling: how to choose.
        next_logits: the logits [vocabulary] that follow a list of tokens.
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
    """One token from its logits [vocabulary] by temperature and nucleus sampling.

    Nucleus (top-p) sampling: Holtzman et al. 2020, arXiv 1904.09751.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    ordered, order = probabilities.sort(descending=True)
    # Keep every token before which less than top_p is held: the likeliest always stays.
    kept = ordered * ((ordered.cumsum(-1) - ordered) < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
