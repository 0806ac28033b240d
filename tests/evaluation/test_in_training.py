"""Tasks in the training loop: the same scores at every layout, and nothing else is changed."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.data.tokenizer import train_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.evaluation.in_training import Prepared, open_evaluation
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import needs_deepspeed, zero
from tests.evaluation.in_training_ranks import (
    Case,
    Found,
    from_logits,
    made_up_rows,
    scored,
)
from tests.settings import settings, small_config
from tests.training.fakes import Alone

SHAPE: dict[str, Any] = {
    "model__blocks": 4,
    "model__hidden_size": 32,
    "model__ffn_hidden_size": 64,
    "training__global_batch_size": 8,
}
ROWS = made_up_rows(45, 32, 512)
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2 + SP": {"parallel__tensor": 2, "parallel__sequence": True},
    "PP 2 x VPP 2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    "DP 2, weights gathered late": {"parallel__overlap_param_gather": True},
    "document masks": {"data__document_masks": True},
}
ZERO = {"ZeRO 1, TP 2": {**zero(1), "parallel__tensor": 2}, "ZeRO 3": zero(3)}


@pytest.fixture(scope="module")
def alone() -> Found:
    """One process, each row in a sequence of its own."""
    ((found,),) = run_ranks(1, scored, [Case(settings(**SHAPE), together=False)], ROWS)
    return found


def test_scores_are_those_of_the_logits(alone: Found) -> None:
    (expected,) = run_ranks(1, from_logits, settings(**SHAPE), ROWS)
    assert alone.scores[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "layouts",
    [pytest.param(LAYOUTS, id="megatron"), pytest.param(ZERO, marks=needs_deepspeed, id="deepspeed")],
)
def test_scores_are_the_same_at_every_layout(layouts: dict[str, Any], alone: Found) -> None:
    """Rows share sequences here, and the replicas share the sequences."""
    cases = [Case(settings(**SHAPE, **overrides)) for overrides in layouts.values()]
    first, second = run_ranks(2, scored, cases, ROWS)
    for name, found, other in zip(layouts, first, second, strict=True):
        assert found.losses == other.losses, name
        assert found.stopped and other.stopped, name
        assert found.marks == other.marks > 3, name
        if name == "document masks":
            assert found.scores[0] == pytest.approx(alone.scores[0], rel=1e-5), name
            continue
        for here, there in zip(found.scores, alone.scores, strict=True):
            assert here == pytest.approx(there, rel=1e-5), name
        assert other.scores == [[], [], []], name


def test_training_is_the_same_to_the_bit_with_an_evaluation() -> None:
    """Dropout would show a generator that has moved."""
    sections = settings(**SHAPE, model__dropout=0.1)
    cases = [Case(sections, evaluates=evaluates) for evaluates in (True, False)]
    ((with_one, without),) = run_ranks(1, scored, cases, ROWS)
    assert with_one.losses == without.losses
    assert with_one.marks > 0 == without.marks
