"""Tasks whose answer needs k steps, one after another, generated as text.

A document is a context and its answer, one symbol: a letter after a space. In training, k is drawn
uniformly from 1 to the largest k; each evaluation file has one k. No document gives away an
intermediate step. A wrong guess among n symbols is right with probability 1 / n.

A context is random, so nothing can be learned of it: only the answer counts in the loss. So the
training text is one of conversations, a question and the assistant's answer, with a chat template
that adds nothing to them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.runtime.files import write_whole

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NUMBERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Numbers from 0, or 1: SentencePiece would cut digits off their space."""
SIGNS = ("?", "=", "+")
_BYTES_AND_CONTROL = 259
MODULUS = 10
POINTERS = 16
PERMUTED = 4
"""Permutations of so many things: 24 symbols."""


@dataclass(frozen=True)
class Problem:
    """A question and its answer, as symbols."""

    context: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of problem."""

    name: str
    what: str
    answers: tuple[str, ...]
    """All symbols that may be an answer."""
    make: Callable[[random.Random, int], Problem]
    """A problem of k steps."""


def hops(draw: random.Random, k: int) -> Problem:
    """Follow a pointer k times: the pairs `x f(x)` of one random cycle, in random order.

    The pointers form a single cycle of `POINTERS` symbols, so that k < POINTERS steps never return.
    """
    symbols = list(LETTERS[:POINTERS])
    draw.shuffle(symbols)
    following = dict(zip(symbols, [*symbols[1:], symbols[0]], strict=True))
    order = draw.sample(symbols, len(symbols))
    start = draw.choice(symbols)
    at = start
    for _ in range(k):
        at = following[at]
    pairs = [symbol for one in order for symbol in (one, following[one])]
    return Problem((*pairs, "?", start, NUMBERS[k], "="), at)


def permutations(draw: random.Random, k: int) -> Problem:
    """Multiply k + 1 permutations of `PERMUTED` things, each a symbol: k products.

    Products are associative, so a tree of about log2(k + 1) levels is enough.
    """
    factors = [draw.randrange(len(_GROUP)) for _ in range(k + 1)]
    product = _GROUP[factors[0]]
    for factor in factors[1:]:
        product = tuple(_GROUP[factor][at] for at in product)
    return Problem((*(LETTERS[factor] for factor in factors), "="), LETTERS[_INDEX[product]])


def chain(draw: random.Random, k: int) -> Problem:
    """Resolve a chain of k assignments `x = y + n` modulo `MODULUS`, in random order."""
    names = draw.sample(LETTERS, k + 1)
    value = draw.randrange(MODULUS)
    statements: list[tuple[str, ...]] = [(names[0], "=", NUMBERS[value])]
    for before, name in itertools.pairwise(names):
        added = draw.randrange(MODULUS)
        value = (value + added) % MODULUS
        statements.append((name, "=", before, "+", NUMBERS[added]))
    draw.shuffle(statements)
    context = [symbol for statement in statements for symbol in statement]
    return Problem((*context, "?", names[-1], "="), NUMBERS[value])


_GROUP = tuple(itertools.permutations(range(PERMUTED)))
_INDEX = {product: number for number, product in enumerate(_GROUP)}
TASKS = {
    task.name: task
    for task in (
        Task("hops", f"follow k of {POINTERS} pointers", LETTERS[:POINTERS], hops),
        Task(
            "permutations",
            f"multiply k + 1 permutations of {PERMUTED} things",
            LETTERS[: len(_GROUP)],
            permutations,
        ),
        Task("chain", f"resolve k assignments modulo {MODULUS}", NUMBERS[:MODULUS], chain),
    )
}
TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] }}{% endgeneration %}
{%- else %}
{{- message['content'] }}
{%- endif %}
{%- endfor %}
"""
LARGEST = POINTERS - 1
"""The largest k that all tasks have."""


def problems(task: Task, count: int, ks: range, seed: str) -> Iterator[tuple[int, Problem]]:
    """Random problems with their k, the same for the same seed."""
    draw = random.Random(f"{task.name} {seed}")
    for _ in range(count):
        k = draw.choice(ks)
        yield k, task.make(draw, k)


def write_training(path: Path, task: Task, count: int, ks: range) -> None:
    """Write a training text as conversations in JSON lines, for `TEMPLATE`.

    Raises:
        OSError: it cannot be written.
    """
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": text(one.context)},
                    {"role": "assistant", "content": text((one.answer,))},
                ]
            }
        )
        for _k, one in problems(task, count, ks, "training")
    ]
    write_whole(path, "\n".join(lines) + "\n")


def write_evaluation(path: Path, task: Task, count: int, k: int) -> None:
    """Write questions of one k as an evaluation task (evaluation/requests.py).

    Raises:
        OSError: it cannot be written.
    """
    choices = [text((answer,)) for answer in task.answers]
    lines = [
        json.dumps(
            {
                "context": text(one.context),
                "choices": choices,
                "answer": task.answers.index(one.answer),
            }
        )
        for _k, one in problems(task, count, range(k, k + 1), f"evaluation {k}")
    ]
    write_whole(path, "\n".join(lines) + "\n")


def write_tokenizer(path: Path) -> int:
    """Write a SentencePiece model with one piece a symbol; its size.

    Raises:
        OSError: it cannot be written.
    """
    from keel_megatron.data.tokenizer import train_tokenizer  # not for `keel --help`

    symbols = (*LETTERS, *NUMBERS, *SIGNS)
    size = _BYTES_AND_CONTROL + 2 * len(symbols)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(train_tokenizer([text(symbols)] * 64, size))
    return size


def longest(task: Task, largest: int) -> int:
    """Tokens of the longest document of up to so many steps, its end included."""
    return len(task.make(random.Random(0), largest).context) + 2


def text(symbols: tuple[str, ...]) -> str:
    """Symbols as text, each after a space."""
    return "".join(f" {symbol}" for symbol in symbols)
