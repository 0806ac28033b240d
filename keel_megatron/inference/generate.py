"""Generate text from a trained run, in one process or over several."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.data.chat.tokens import ChatTokenizer
from keel_megatron.errors import UserError
from keel_megatron.inference.decoder import Decoder
from keel_megatron.inference.generation import Generation, Reason, Sequence, Speed
from keel_megatron.inference.sampling import Sampling
from keel_megatron.inference.source import Source, opened
from keel_megatron.runtime.distributed import Runtime

BATCH_SIZE = 8


@dataclass(frozen=True)
class Completion:
    """A prompt's continuation."""

    prompt: str
    text: str
    """What follows the prompt."""
    tokens: int
    """New tokens; those of a stop text count."""
    ended: Reason


def generate_from_run(run: Path, prompt: str, sampling: Sampling) -> str:
    """A prompt and its continuation; see `generate_prompts`."""
    completions, _speed = generate_prompts(run, [prompt], sampling)
    return prompt + completions[0].text


def generate_prompts(
    run: Path,
    prompts: list[str],
    sampling: Sampling,
    *,
    step: int | None = None,
    processes: int = 1,
    **options: Any,
) -> tuple[list[Completion], Speed]:
    """Continue prompts with a run's model; on every rank the same.

    Args:
        run: folder of a run, for its newest valid checkpoint, or of a checkpoint.
        prompts: the texts to continue.
        sampling: the settings.
        step: of the checkpoint; None: the newest.
        processes: ranks that share the model; with more than one, this is one of them.
        options: keyword arguments of `continue_prompts`.

    Raises:
        UserError: as `continue_prompts`; or the folder holds no run or no such checkpoint, or the
            model cannot be split over the processes.
    """
    opening = opened(run, step=step, processes=processes, model_processes=processes)
    with opening as (source, runtime):
        return continue_prompts(source, runtime, prompts, sampling, **options)


def continue_prompts(
    source: Source,
    runtime: Runtime,
    prompts: list[str],
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
    cuda_graphs: bool = False,
    chat: bool = False,
    say: Callable[[str], None] | None = None,
    done: Callable[[int, Completion], None] = lambda _number, _completion: None,
) -> tuple[list[Completion], Speed]:
    """Continue prompts with a loaded model; collective over its ranks, on each the same.

    Args:
        source: the model.
        runtime: this rank's place.
        prompts: the texts to continue.
        sampling: the settings.
        batch_size: prompts that are continued at a time.
        cuda_graphs: decode with one CUDA graph a token; in one process only.
        chat: each prompt is a user's message, which the model answers.
        say: called on rank 0 with a single prompt, but for an answer, then with its continuation,
            piece by piece.
        done: called with a prompt's number and continuation, at the end of each batch.

    Raises:
        UserError: a prompt does not fit, the model's logits are not finite, or the device has no
            CUDA graphs, or the model no chat template.
    """
    config = source.config
    if cuda_graphs and runtime.device.type != "cuda":
        raise UserError("--cuda-graphs: needs a CUDA device, and the model runs on the CPU")
    encoded, ends = _encoded(source, prompts, chat=chat, is_main=runtime.is_main)
    tokens = dict(enumerate(encoded))
    _check_lengths(tokens, source, sampling, is_main=runtime.is_main)
    decoder = Decoder(source.model, config.model, runtime, static=cuda_graphs)
    context = config.data.seq_length
    generation = Generation(decoder, source.tokenizer, context, sampling, ends)
    streams = say if runtime.is_main and len(prompts) == 1 else None
    if streams is not None and not chat:
        streams(prompts[0])
    found: dict[int, Completion] = {}
    # Prompts of similar lengths together: less padding.
    order = sorted(tokens, key=lambda number: len(tokens[number]), reverse=True)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for row in generation.run({number: tokens[number] for number in batch}, streams):
            found[row.number] = _completion(prompts[row.number], row)
            done(row.number, found[row.number])
    return [found[number] for number in range(len(prompts))], generation.speed


def _encoded(
    source: Source, prompts: list[str], *, chat: bool, is_main: bool
) -> tuple[list[list[int]], dict[int, Reason]]:
    """The prompts' tokens, and the tokens that end a continuation or an answer.

    Raises:
        UserError: of a chat: the model has no template, or it refuses a message.
    """
    if not chat:
        eod = source.tokenizer.eod
        tokens = [source.tokenizer.encode(prompt) or [eod] for prompt in prompts]
        return tokens, {eod: "end of document"}
    template = source.template
    if template is None:
        raise UserError(
            "--chat: the model has no chat template; train it on conversations (data.sources with "
            "format: chat)",
            reported=not is_main,
        )
    found = []
    with ChatTokenizer(source.tokenizer, template.text, template.origin) as conversation:
        for number, prompt in enumerate(prompts, 1):
            try:
                found.append(conversation.prompt([{"role": "user", "content": prompt}]))
            except ValueError as error:
                raise UserError(f"prompt {number}: {error}", reported=not is_main) from error
        return found, dict.fromkeys(conversation.ends(), "end of answer")


def _completion(prompt: str, row: Sequence) -> Completion:
    assert row.ended is not None
    return Completion(prompt, row.text, len(row.new), row.ended)


def _check_lengths(
    tokens: dict[int, list[int]], source: Source, sampling: Sampling, *, is_main: bool
) -> None:
    """Check that every prompt fits in the context.

    Raises:
        UserError: one does not, and the context does not slide.
    """
    context = source.config.data.seq_length
    for number, prompt in tokens.items():
        if len(prompt) < context:
            continue
        if not sampling.slide:
            raise UserError(
                f"prompt {number + 1} has {len(prompt)} tokens and the context {context} "
                "(data.seq_length): no new token fits; shorten it, or add --slide",
                reported=not is_main,
            )
        if is_main:
            print(
                f"prompt {number + 1} has {len(prompt)} tokens and the context {context} "
                f"(data.seq_length): only its last {max(1, context // 2)} tokens are used",
                file=sys.stderr,
            )
