"""How the next token is chosen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from keel_megatron.config import UserError
from keel_megatron.inference.sampling import Sampling, choose


def draw(logits: list[float], count: int, **settings: float) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**settings)  # type: ignore[arg-type]
    return [choose(torch.tensor(logits), sampling, generator) for _ in range(count)]


def test_no_temperature_takes_the_likeliest() -> None:
    assert set(draw([0.0, 3.0, 2.9], 50, temperature=0.0)) == {1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    for logits in ([0.0, 3.0, 2.9], [-200.0, -100.0, -100.1], [1e30, 3e38, -3e38] * 100):
        drawn = {logits[token] for token in draw(logits, 5, temperature=temperature)}
        assert drawn == {max(logits)}


def test_frequencies_follow_the_softmax() -> None:
    logits = [0.0, 1.0, 2.0]
    drawn = torch.tensor(draw(logits, 20_000, temperature=0.5, top_p=1.0))
    found = torch.bincount(drawn, minlength=3) / len(drawn)
    expected = torch.softmax(torch.tensor(logits) / 0.5, -1)
    assert torch.allclose(found, expected, atol=0.01)


def test_the_nucleus_leaves_out_the_unlikely() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).tolist()
    assert set(draw(logits, 2000, temperature=1.0, top_p=0.8)) == {0, 1}
    assert set(draw(logits, 2000, temperature=1.0, top_p=0.81)) == {0, 1, 2}
    assert set(draw(logits, 100, temperature=1.0, top_p=0.01)) == {0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": math.nan}, "--temperature: nan must be a number"),
        ({"seed": -1}, "--seed: -1 must be from 0"),
        ({"seed": 10**20}, "--seed"),
        ({"top_p": 0.0}, "--top-p"),
        ({"stop": ("a", "")}, "--stop: the text must not be empty"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Sampling(**settings)
