"""Tasks in the training loop: the same scores at every layout, and nothing else is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keel_megatron.data.tokenizer import open_tokenizer, train_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.evaluation.in_training import _row, open_evaluation, shares_sequences
from keel_megatron.evaluation.rows import Row
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import needs_deepspeed, zero
from tests.evaluation.in_training_ranks import (
    Case,
    Found,
    made_up_rows,
    scored,
    scored_and_expected,
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
def one_process() -> tuple[list[Found], list[float]]:
    """Rows in sequences of their own; with dropout, evaluated and not; and scores from logits."""
    dropping = settings(**SHAPE, model__dropout=0.1)
    cases = [
        Case(settings(**SHAPE), together=False),
        Case(dropping),
        Case(dropping, evaluates=False),
    ]
    (found,) = run_ranks(1, scored_and_expected, cases, ROWS)
    return found  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def alone(one_process: tuple[list[Found], list[float]]) -> Found:
    return one_process[0][0]


def test_scores_are_those_of_the_logits(one_process: tuple[list[Found], list[float]]) -> None:
    (alone, *_), expected = one_process
    assert alone.scores[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(LAYOUTS, id="megatron"),
        pytest.param(ZERO, marks=needs_deepspeed, id="deepspeed"),
    ],
)
def test_scores_are_the_same_at_every_layout(layouts: dict[str, Any], alone: Found) -> None:
    """Rows share sequences here, and the replicas share the sequences."""
    cases = [Case(settings(**SHAPE, **overrides)) for overrides in layouts.values()]
    first, second = run_ranks(2, scored, cases, ROWS)
    for name, found, other in zip(layouts, first, second, strict=True):
        assert found.losses == other.losses, name
        assert [found.stopped, other.stopped] == [True, True], name
        assert found.marks == other.marks > 3, name
        if name == "document masks":
            assert found.scores[0] == pytest.approx(alone.scores[0], rel=1e-5), name
            continue
        for here, there in zip(found.scores, alone.scores, strict=True):
            assert here == pytest.approx(there, rel=1e-5), name
        assert other.scores == [[], [], []], name


def test_training_is_the_same_to_the_bit_with_an_evaluation(
    one_process: tuple[list[Found], list[float]],
) -> None:
    """Dropout would show a generator that has moved."""
    (_, with_one, without), _ = one_process
    assert with_one.losses == without.losses
    assert with_one.marks > 0 == without.marks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(["a list is a sequence of values"] * 20, 290))
    return path


def prepared(tmp_path: Path, tokenizer: Path, *lines: Any, length: int = 32) -> list[str]:
    """What is said about a task with these lines."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = small_config(
        evaluation__every=5, evaluation__tasks=[str(path)], data__seq_length=length
    )
    said: list[str] = []
    runtime: Any = Alone()
    runtime.data_rank, runtime.data_size = 0, 1
    assert open_evaluation(config, runtime, tokenizer, said.append) is not None
    return said


def test_a_long_context_is_cut_on_the_left_and_said_once(tmp_path: Path, tokenizer: Path) -> None:
    short = {"context": "a list is", "choices": [" a sequence", " values"], "answer": 0}
    long = {**short, "context": "values, " * 40}
    said = prepared(tmp_path, tokenizer, short, long, long)
    assert said == [
        "evaluation, own: 4 continuations with their contexts are longer than data.seq_length = "
        "32; the beginning of these contexts is cut off",
        "evaluation every 5 steps: own (3 documents); 6 continuations in 5 sequences, 0.3 times "
        "training.global_batch_size",
    ]


def test_a_continuation_that_does_not_fit_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    line = {"context": "a list", "continuation": " is a sequence of values" * 8}
    with pytest.raises(UserError, match=r"own: a continuation has \d+ tokens, and .* has 16 "):
        prepared(tmp_path, tokenizer, line, length=16)


def test_rows_end_with_their_continuations(tokenizer: Path) -> None:
    """Both are encoded apart; an empty context is the end of a document."""
    encoder = open_tokenizer(tokenizer)
    before, scored = encoder.encode("a list"), encoder.encode(" is values")
    whole = (*before, *scored)
    for context, length, tokens in (
        ("a list", 32, whole),
        ("a list", len(whole) - 1, whole),
        ("a list", len(whole) - 2, whole[1:]),
        ("", 32, (encoder.eod, *scored)),
    ):
        row, is_cut = _row(context, " is values", encoder, length, "own")
        assert row == Row(tokens, len(scored))
        assert is_cut == (length == len(whole) - 2)


def test_a_run_without_evaluation_has_none(tokenizer: Path) -> None:
    runtime: Any = None
    config = small_config(evaluation__tasks=["piqa"])
    assert open_evaluation(config, runtime, tokenizer, lambda _text: None) is None


@pytest.mark.parametrize(
    ("device", "overrides", "shares"),
    [
        ("cpu", {}, True),
        ("cpu", {"kernels__backend": "transformer_engine"}, False),
        ("cuda", {}, False),  # fp32: a mask would take memory that nothing has counted
        ("cuda", {"data__document_masks": True}, True),
        ("cuda", {"training__precision": "bf16"}, True),
    ],
)
def test_rows_share_sequences_where_that_takes_no_further_memory(
    device: str, overrides: dict[str, Any], shares: bool
) -> None:
    config = small_config(**overrides)
    assert shares_sequences(config, torch.device(device)) is shares
