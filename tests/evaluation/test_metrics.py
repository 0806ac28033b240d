"""Metrics of tasks against ai2-olmo-eval's formulas, written down here a second time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from keel_megatron.evaluation.metrics import Question, measure
from keel_megatron.evaluation.requests import Document

TEXTS = [" a", " long winded", " grün", " \u0304\U0001f600 no"]


def documents(count: int) -> list[Document]:
    generator = torch.Generator().manual_seed(count)
    found = []
    for number in range(count):
        order = torch.randperm(4, generator=generator).tolist()
        texts = [TEXTS[place] for place in order][: 2 + number % 3]
        found.append(Document(tuple(("why?", text) for text in texts), number % len(texts)))
    return found


def by_formula(document: Document, log_probabilities: list[float]) -> tuple[float, float, float]:
    """acc, len_norm and bpb of one document, as `ICLMetric` of version 0.9.0 computes them."""
    answers = [text for _context, text in document.choices]
    likelihoods = torch.tensor(log_probabilities, dtype=torch.float64)
    lengths = torch.tensor([len(text) for text in answers])
    right = answers[document.answer]
    bits = -log_probabilities[document.answer] / len(right.encode("utf-8")) * 1.44269504089
    return (
        float(torch.argmax(likelihoods).item() == document.answer),
        float(torch.argmax(likelihoods / lengths).item() == document.answer),
        bits,
    )


def test_metrics_of_choices() -> None:
    chosen = documents(100)
    generator = torch.Generator().manual_seed(1)
    scores = [
        (-20 * torch.rand(len(one.choices), generator=generator, dtype=torch.float64)).tolist()
        for one in chosen
    ]
    expected = [by_formula(one, own) for one, own in zip(chosen, scores, strict=True)]
    found = measure([Question.of(one) for one in chosen], [p for own in scores for p in own])
    acc, acc_norm, bits = (sum(column) / 100 for column in zip(*expected, strict=True))
    assert found == pytest.approx({"acc": acc, "acc_norm": acc_norm, "bits_per_byte": bits})
    assert acc != acc_norm


def test_metrics_of_one_continuation_each() -> None:
    """A byte takes log2 of its possibilities: 8 bits if all are alike."""
    one = Document((("", " grün"),), 0)
    uniform = -len(" grün".encode()) * math.log(256)
    assert measure([Question.of(one)] * 2, [uniform, 0.0]) == pytest.approx({"bits_per_byte": 4.0})


def test_a_diverged_model_has_metrics_too() -> None:
    questions: list[Any] = [Question((1, 1), 1, 1)]
    found = measure(questions, [math.nan, math.nan])
    assert math.isnan(found["bits_per_byte"])
    assert found["acc"] == 0.0
