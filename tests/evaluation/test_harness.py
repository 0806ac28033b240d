"""The model gives lm-eval what lm-eval's own `hf` model gives it on the exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.evaluation.serving import Served
from keel_megatron.evaluation.tasks import Choice, load_tasks
from keel_megatron.inference import parity
from keel_megatron.inference.export import export_run
from keel_megatron.inference.source import opened
from tests.evaluation.hf import hf_model
from tests.evaluation.local_tasks import NAMES

parity.require_transformers()  # before anything imports it: sets its variables


def answers(model: Any, choice: Choice) -> dict[str, list[Any]]:
    """Every document's answers, and every task's metrics."""
    from lm_eval.evaluator import evaluate

    found = evaluate(lm=model, task_dict=load_tasks(choice), bootstrap_iters=0)
    documents = found["samples"]
    return {
        name: [document["filtered_resps"] for document in documents[name]] + [found["results"]]
        for name in documents
    }


def numbers(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in numbers(part)]
    return [value]


@pytest.mark.parametrize(("rule", "shots"), [("keel", 2), ("pre_ln", 0)])
def test_the_same_as_lm_evals_own_model(
    runs: Path, local_tasks: Path, tmp_path: Path, rule: str, shots: int
) -> None:
    from keel_megatron.evaluation.harness import KeelLM

    choice = Choice(NAMES, local_tasks, shots=shots)
    with opened(runs / rule) as (source, runtime):
        # 64: batches of two; one replica.
        own = answers(KeelLM(Served(source, runtime, 64)), choice)
        decode = source.tokenizer.decode
    folder = tmp_path / rule
    export_run(runs / rule, folder, step=None, dtype="fp32", check=False, say=lambda _text: None)
    model = hf_model(folder)
    theirs_of = model.tok_decode

    def own_decode(tokens: Any, **more: Any) -> str:
        """Random weights write bytes that are no UTF-8, which tokenizers decodes differently
        (tests/data/test_tokenizer_json.py); the end of a document, a number, is its own."""
        return str(decode(tokens) if isinstance(tokens, list) else theirs_of(tokens, **more))

    model.tok_decode = own_decode
    theirs = answers(model, choice)
    assert own.keys() == theirs.keys() == set(NAMES)
    for name in NAMES:
        for mine, other in zip(numbers(own[name]), numbers(theirs[name]), strict=True):
            assert mine == (pytest.approx(other, rel=1e-6, abs=1e-4) if is_real(mine) else other)


def is_real(value: Any) -> bool:
    return isinstance(value, float)
