"""Scores are log probabilities of the whole sequence's logits, however rows are batched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.evaluation import scoring
from keel_megatron.evaluation.rows import Row, Score
from keel_megatron.evaluation.scoring import Scorer
from keel_megatron.inference.source import Source
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from tests.distributed import run_ranks
from tests.huggingface.models import disturb
from tests.settings import small_config

VOCABULARY, CONTEXT = 512, 32
RULES: dict[str, dict[str, Any]] = {
    "keel": {"model__num_query_groups": 2},
    "pre_ln": {"model__tie_embeddings": True},
    "hybrid_norm": {},
}


def run_config(rule: str, **overrides: Any) -> RunConfig:
    """A small run with weights so large that attention is sharp."""
    return small_config(
        **{
            "model__residual": rule,
            "model__blocks": 3,
            "model__init_std": 0.1,
            # 16 tokens' logits at a time.
            "kernels__logits_mib": 4 * VOCABULARY * 16 / 2**20,
            **RULES[rule],
            **overrides,
        }
    )


def source_of(config: RunConfig, runtime: Runtime) -> Source:
    from keel_megatron.model.language_model import build_model

    (chunk,) = build_model(config, runtime)
    disturb(chunk)
    return Source(config, chunk, None, ())  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=RULES)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[Source, Runtime]]:
    config = run_config(request.param)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        yield source_of(config, runtime), runtime


def rows_of(shapes: list[tuple[int, int]], seed: int) -> list[Row]:
    """Rows of (length, scored tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Row(tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()), scored)
        for length, scored in shapes
    ]


@torch.inference_mode()
def expected_score(source: Source, row: Row) -> Score:
    """From the logits of the plain forward pass of this row alone."""
    tokens = torch.tensor([row.tokens[:-1]])
    logits = source.model(tokens, torch.arange(tokens.shape[1])[None], None)[0].double()
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    found, greedy = [], True
    for position in range(len(row.tokens) - 1 - row.scored, len(row.tokens) - 1):
        found.append(float(logs[position, row.tokens[position + 1]]))
        greedy = greedy and int(logits[position].argmax()) == row.tokens[position + 1]
    return Score(tuple(found), greedy)


SHAPES = st.integers(2, CONTEXT + 1).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, length - 1))
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=6),
    batch_tokens=st.sampled_from([1, 40, 100, 10_000]),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_each_row_alone(
    opened: tuple[Source, Runtime], shapes: list[tuple[int, int]], batch_tokens: int, seed: int
) -> None:
    rows = rows_of(shapes, seed)
    found = Scorer(*opened, batch_tokens).score(rows)
    for row, score in zip(rows, found, strict=True):
        expected = expected_score(opened[0], row)
        assert len(score.log_probabilities) == row.scored
        assert score.log_probabilities == pytest.approx(
            expected.log_probabilities, rel=1e-5, abs=1e-5
        )
        assert score.greedy == expected.greedy
        assert score.total == pytest.approx(expected.total, rel=1e-5)


@torch.inference_mode()
def test_greedy_is_told_of_the_whole_continuation(opened: tuple[Source, Runtime]) -> None:
    source, _runtime = opened
    tokens = [5, 7, 11]
    while len(tokens) < CONTEXT + 1:
        positions = torch.arange(len(tokens))[None]
        tokens.append(int(source.model(torch.tensor([tokens]), positions, None)[0, -1].argmax()))
    other = [*tokens]
    other[10] = (other[10] + 1) % VOCABULARY
    rows = [Row(tuple(tokens), CONTEXT - 2), Row(tuple(other), 30), Row(tuple(tokens[:4]), 1)]
    assert [score.greedy for score in Scorer(*opened, 64).score(rows)] == [True, False, True]


def test_no_rows_have_no_scores(opened: tuple[Source, Runtime]) -> None:
    assert Scorer(*opened, 64).score([]) == []


@pytest.mark.parametrize("shape", [(CONTEXT + 2, 1), (3, 3), (3, 0), (1, 0)])
def test_rows_that_cannot_be_scored(opened: tuple[Source, Runtime], shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"a row of {shape[0]} tokens, {shape[1]} of them scored"):
        Scorer(*opened, 64).score(rows_of([shape], 0))


def test_progress_is_said(opened: tuple[Source, Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, said = rows_of([(5, 1)] * 4, 0), list[str]()
    Scorer(*opened, 8).score(rows, said.append)
    monkeypatch.setattr(scoring, "SECONDS_BETWEEN_LINES", 0.0)
    Scorer(*opened, 8).score(rows, said.append)
    assert [line.split()[0] for line in said][-4:] == ["50%", "100%"]


LENGTHS = [(CONTEXT + 1, CONTEXT), (2, 1), (17, 3), (9, 8), (CONTEXT + 1, 1), (5, 2), (30, 29)]


def split_scores(rule: str, tensor: int, pipeline: int) -> list[Score]:
    """Scores of the same rows at a layout; what is left of the ranks are replicas."""
    from keel_megatron.model.language_model import build_model

    config = run_config(rule, parallel__tensor=tensor, parallel__pipeline=pipeline)
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime)
        source = Source(config, chunk, None, ())  # type: ignore[arg-type]
        return Scorer(source, runtime, 70).score(rows_of(LENGTHS, 3))


@pytest.mark.parametrize(
    ("rule", "tensor", "pipeline", "ranks"),
    [("keel", 1, 2, 4), ("pre_ln", 2, 1, 2), ("hybrid_norm", 2, 2, 4), ("keel", 1, 1, 2)],
)
def test_every_layout_has_the_same_scores(
    rule: str, tensor: int, pipeline: int, ranks: int
) -> None:
    (expected,) = run_ranks(1, split_scores, rule, 1, 1)
    found = run_ranks(ranks, split_scores, rule, tensor, pipeline)
    assert all(scores == found[0] for scores in found[1:])
    for own, other in zip(expected, found[0], strict=True):
        assert other.log_probabilities == pytest.approx(own.log_probabilities, rel=1e-5, abs=1e-5)
        assert other.greedy == own.greedy


def diverged(pipeline: int) -> tuple[str, bool]:
    """What is raised if the logits are not finite, and whether rank 0 reports it."""
    config = run_config("keel", parallel__pipeline=pipeline)
    with start(config.parallel, config.training) as runtime:
        source = source_of(config, runtime)
        for parameter in source.model.parameters():
            parameter.data[:] = float("nan")
        with pytest.raises(UserError) as error:
            Scorer(source, runtime, 64).score(rows_of([(4, 2), (3, 1)], 0))
        return str(error.value), error.value.reported


def test_a_model_that_has_diverged_is_told_on_every_rank() -> None:
    found = run_ranks(2, diverged, 2)
    assert [reported for _message, reported in found] == [False, True]
    for message, _reported in found:
        assert message.startswith("the model's logits are not finite: its training has diverged")
