"""The loop: what a continuation is, whatever batch it is in, and where it ends."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keel_megatron.config import UserError
from keel_megatron.inference.generation import Generation, Sequence
from keel_megatron.inference.sampling import Sampling

EOD = 9


class Letters:
    """A tokenizer whose token n is the n-th letter."""

    eod = EOD

    def decode(self, tokens: list[int]) -> str:
        return "".join("abcdefghi"[token] for token in tokens if token != EOD)


class Counter:
    """A model for which the next token is the last one plus one, at most `last`.

    It notes what it was given.
    """

    runtime = SimpleNamespace(is_main=True)

    def __init__(self, last: int = EOD, level: float = 5.0) -> None:
        self.last, self.level = last, level
        self.read: list[list[list[int]]] = []

    def _logits(self, tokens: list[int]) -> Tensor:
        wanted = torch.tensor([min(token + 1, self.last) for token in tokens])
        return torch.nn.functional.one_hot(wanted, EOD + 1).float() * self.level

    def prefill(self, sequences: list[list[int]], new: int) -> Tensor:
        assert new > 0
        self.read.append([list(tokens) for tokens in sequences])
        return self._logits([tokens[-1] for tokens in sequences])

    def step(self, tokens: list[int]) -> Tensor:
        return self._logits(tokens)

    def agree(self, tokens: list[int]) -> list[int]:
        return tokens


def run(
    prompts: list[list[int]], model: Any = None, context: int = 100, **sampling: Any
) -> list[Sequence]:
    chosen = Sampling(**{"temperature": 0.0, **sampling})
    generation = Generation(model or Counter(), Letters(), context, chosen)
    return generation.run(dict(enumerate(prompts)))


def test_a_document_ends_at_its_end() -> None:
    short, long = run([[6], [0, 4]])
    assert (short.new, short.text, short.ended) == ([7, 8], "hi", "end of document")
    assert (long.new, long.ended) == ([5, 6, 7, 8], "end of document")


def test_a_continuation_ends_at_the_maximum() -> None:
    short, long = run([[6], [0]], max_new_tokens=3)
    assert short.ended == "end of document"
    assert (long.new, long.ended) == ([1, 2, 3], "maximum of new tokens")


def test_a_stop_text_ends_it_and_is_left_out() -> None:
    (row,) = run([[0]], stop=("zz", "de"))
    assert (row.text, row.new, row.ended) == ("bc", [1, 2, 3, 4], "stop text")


def test_the_contexts_end_is_told() -> None:
    full, other = run([[0, 0, 0], [0]], context=5)
    assert (full.new, full.ended) == ([1, 2], "end of context")
    assert (other.new, other.ended) == ([1, 2, 3, 4], "end of context")


def test_a_full_context_slides() -> None:
    model = Counter(last=7)
    first, second = run([[0, 1, 2], [7]], model, context=6, slide=True, max_new_tokens=6)
    assert first.new == [3, 4, 5, 6, 7, 7]
    assert second.new == [7] * 6
    # Full after three tokens; the shorter one is read again as it is, then it is full itself.
    assert model.read[:2] == [[[0, 1, 2], [7]], [[3, 4, 5], [7, 7, 7, 7]]]
    assert [len(tokens) for tokens in model.read[2]] == [5, 3]
    assert all(row.ended == "maximum of new tokens" for row in (first, second))


def test_a_prompt_that_fills_the_context_slides_at_once() -> None:
    model = Counter(last=5)
    (row,) = run([[1] * 9], model, context=4, slide=True, max_new_tokens=2)
    assert model.read[0] == [[1, 1]]
    assert row.new == [2, 3]


def test_a_sample_does_not_depend_on_the_batch() -> None:
    settings = {"temperature": 2.0, "top_p": 1.0, "max_new_tokens": 12, "seed": 3}
    prompts = [[0], [3, 2], [1, 1, 1]]
    together = run(prompts, Counter(level=1.0), **settings)
    chosen = Sampling(**settings)
    for number, row in enumerate(together):
        generation = Generation(Counter(level=1.0), Letters(), 100, chosen)  # type: ignore[arg-type]
        assert generation.run({number: prompts[number]})[0].new == row.new
    assert run(prompts, Counter(level=1.0), **settings | {"seed": 4}) != together


def test_speed_counts_decoded_tokens() -> None:
    generation = Generation(Counter(), Letters(), 100, Sampling(temperature=0.0))  # type: ignore[arg-type]
    said: list[str] = []
    generation.run({0: [6], 1: [4, 4]}, said.append)
    assert said == ["h", "i"]
    assert (generation.speed.prompt_tokens, generation.speed.decoded_tokens) == (3, 2 + 4)
    assert "6 decoded in" in generation.speed.line()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_told(temperature: float) -> None:
    with pytest.raises(UserError, match=r"logits are not finite: its training has diverged"):
        run([[0]], Counter(level=math.nan), temperature=temperature)
