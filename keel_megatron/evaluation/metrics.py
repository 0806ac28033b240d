"""Metrics of a task from the log probabilities of its continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keel_megatron.evaluation.requests import Document


@dataclass(frozen=True)
class Question:
    """What the metrics need of a document."""

    characters: tuple[int, ...]
    """Length of each continuation, a leading space included."""
    bytes: int
    """Length of the right one in UTF-8."""
    answer: int
    """Number of the right one."""

    @classmethod
    def of(cls, document: Document) -> Question:
        """The question of a document."""
        texts = [continuation for _context, continuation in document.choices]
        length = len(texts[document.answer].encode())
        return cls(tuple(map(len, texts)), length, document.answer)


def measure(questions: Sequence[Question], log_probabilities: Sequence[float]) -> dict[str, float]:
    """Metrics of a task.

    acc and acc_norm are shares of questions whose most probable continuation is the right one, by
    log p and by log p / characters; only where there are choices. bits_per_byte is the mean over
    the documents of -log2 p / bytes of the right continuation.

    Args:
        questions: of the task's documents.
        log_probabilities: of all continuations, document after document, in nats.
    """
    right = right_norm = bits = 0.0
    start = 0
    for question in questions:
        count = len(question.characters)
        own = log_probabilities[start : start + count]
        start += count
        by_character = [p / n for p, n in zip(own, question.characters, strict=True)]
        right += own.index(max(own)) == question.answer
        right_norm += by_character.index(max(by_character)) == question.answer
        bits -= own[question.answer] / question.bytes / math.log(2)
    metrics = {}
    if any(len(question.characters) > 1 for question in questions):
        metrics = {"acc": right / len(questions), "acc_norm": right_norm / len(questions)}
    return {**metrics, "bits_per_byte": bits / len(questions)}
