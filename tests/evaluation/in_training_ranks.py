"""What the ranks of the tests of evaluation in training run."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from keel_megatron.config.run import RunConfig
from keel_megatron.evaluation.metrics import Question
from keel_megatron.evaluation.packing import Packing
from keel_megatron.evaluation.rows import Row
from keel_megatron.runtime.distributed import start
from tests.training.ranks import made_up_batches


def made_up_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Rows of all lengths that a context of `length` takes."""
    generator = random.Random(7)
    rows = []
    for _ in range(count):
        tokens = generator.randint(2, length + 1)
        scored = generator.randint(1, tokens - 1)
        rows.append(Row(tuple(generator.randrange(vocabulary) for _ in range(tokens)), scored))
    return rows


@dataclass(frozen=True)
class Case:
    """A run, and how its rows are evaluated."""

    sections: dict[str, Any]
    together: bool = True
    """Rows share sequences."""
    evaluates: bool = True


@dataclass(frozen=True)
class Found:
    """What a rank has seen."""

    scores: list[list[float]]
    """The rows' log probabilities before the first step, after it and after the second."""
    losses: list[float]
    """Of the two steps."""
    marks: int
    """Parts of the work that were marked."""
    stopped: bool
    """Whether an evaluation that one rank was asked to stop ended on this rank."""


def scored(cases: list[Case], rows: list[Row]) -> list[Found]:
    """Of each case, two steps and evaluations around them."""
    return [_scored(case, rows) for case in cases]


def scored_and_expected(cases: list[Case], rows: list[Row]) -> tuple[list[Found], list[float]]:
    """The same, and `_from_logits` of the first."""
    return scored(cases, rows), _from_logits(cases[0].sections, rows)


def _scored(case: Case, rows: list[Row]) -> Found:
    from keel_megatron.engines.build import build_engine
    from keel_megatron.evaluation.in_training import Evaluation, Prepared
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(case.sections)
    marks: list[str] = []
    found, losses = [], []
    with start(config.parallel, config.training) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        questions = {str(number): [Question((1,), 1, 0)] for number in range(len(rows))}
        packing = Packing(rows, config.data.seq_length, 0, together=case.together)
        evaluation = Evaluation(config, runtime, Prepared(packing, questions, []))
        for step in range(3):
            if case.evaluates:
                results = evaluation.run(engine, lambda: False, marks.append)
                assert results is not None
                bits = [results[name]["bits_per_byte"] for name in questions if results]
                found.append([-value * math.log(2) for value in bits])
            if step < 2:
                batches = made_up_batches(config, runtime, step)
                losses.append(engine.train_step(batches, len(batches), 1e-3).loss)
        done = len(marks)
        stopped = evaluation.run(engine, lambda: runtime.rank == 0, marks.append) is None
        return Found(found, losses, done, stopped and len(marks) == done)


def _from_logits(sections: dict[str, Any], rows: list[Row]) -> list[float]:
    """The rows' log probabilities under the initial weights, each row by itself, from logits."""
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    found = []
    with start(config.parallel, config.training) as runtime, torch.no_grad():
        (chunk,) = build_model(config, runtime)
        chunk.eval()
        for row in rows:
            inputs = torch.tensor([row.tokens[:-1]])
            padded = torch.nn.functional.pad(inputs, (0, config.data.seq_length - inputs.size(1)))
            logits = chunk(padded, None, None)[0].double()
            at = range(len(row.tokens) - 1 - row.scored, len(row.tokens) - 1)
            chances = logits.log_softmax(-1)
            found.append(sum(float(chances[place, row.tokens[place + 1]]) for place in at))
    return found
