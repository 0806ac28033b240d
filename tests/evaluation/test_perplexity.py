"""Means over bytes and tokens, and their standard errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from keel_megatron.evaluation.perplexity import DocumentScore, total


def random_documents(count: int, seed: int) -> list[DocumentScore]:
    numbers = np.random.default_rng(seed)
    found = []
    for number in range(count):
        size = int(numbers.integers(20, 200))
        nats = float(size * numbers.normal(0.7, 0.1))
        found.append(DocumentScore(str(number), size, size // 3, nats))
    return found


def test_means_are_over_all_bytes_and_tokens() -> None:
    found = total([DocumentScore("a", 10, 2, 4.0, 1), DocumentScore("b", 30, 6, 8.0)])
    assert (found.documents, found.bytes, found.tokens, found.lost_characters) == (2, 40, 8, 1)
    assert found.nats == 12.0
    assert found.bits_per_byte == pytest.approx(12.0 / 40 / math.log(2))
    assert found.perplexity == pytest.approx(math.exp(1.5))


def test_of_documents_of_one_size_the_error_is_the_means() -> None:
    nats = [3.0, 5.0, 4.0, 8.0]
    found = total([DocumentScore("x", 10, 2, value) for value in nats])
    of_mean = float(np.std(nats, ddof=1)) / 2  # the root of 4 documents
    assert found.bits_per_byte_stderr == pytest.approx(of_mean / 10 / math.log(2))
    assert found.perplexity is not None
    assert found.perplexity_stderr == pytest.approx(of_mean / 2 * found.perplexity)


def test_of_documents_of_any_size_the_error_is_about_the_jackknifes() -> None:
    documents = random_documents(300, 0)
    without = [total(documents[:n] + documents[n + 1 :]) for n in range(len(documents))]
    for name in ("bits_per_byte", "perplexity"):
        values = np.array([getattr(one, name) for one in without])
        jackknife = math.sqrt((len(values) - 1) * float(values.var()))
        assert getattr(total(documents), f"{name}_stderr") == pytest.approx(jackknife, rel=0.03)


def test_what_cannot_be_divided_is_missing() -> None:
    one = total([DocumentScore("a", 10, 2, 4.0)])
    assert one.bits_per_byte_stderr is None
    assert one.perplexity_stderr is None
    nothing = DocumentScore("a", 10)  # a tokenizer that drops white space
    assert nothing.record()["perplexity"] is None
    assert total([]).bits_per_byte is None
    assert DocumentScore("a", 1, 1, 1e6).record()["perplexity"] == math.inf
    json.dumps(nothing.record())
