"""Generated tasks of k sequential steps, and the study that trains on them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from keel_megatron.data.chat.tokens import ChatTokenizer
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.evaluation import requests
from keel_megatron.studies import depth_tasks, generated_tasks
from keel_megatron.studies.generated_tasks import NUMBERS, TASKS, text
from keel_megatron.studies.grid import Axes
from tests.settings import small_config

KS = range(1, 7)


def follow(context: tuple[str, ...]) -> str:
    """The answer of hops, from the text alone."""
    pairs, start, hops = context[:-4], context[-3], NUMBERS.index(context[-2])
    following = dict(zip(pairs[::2], pairs[1::2], strict=True))
    for _ in range(hops):
        start = following[start]
    return start


def resolve(context: tuple[str, ...]) -> str:
    """The answer of chain, by recursion over the statements in the text."""
    body, name = " ".join(context[:-3]), context[-2]
    values: dict[str, list[str]] = {}
    words = body.split()
    starts = [n - 1 for n, word in enumerate(words) if word == "="] + [len(words)]
    for first, end in itertools.pairwise(starts):
        values[words[first]] = words[first + 2 : end]

    def value(of: str) -> int:
        parts = values[of]
        if len(parts) == 1:
            return NUMBERS.index(parts[0])
        return (value(parts[0]) + NUMBERS.index(parts[2])) % 10

    return NUMBERS[value(name)]


def multiply(context: tuple[str, ...]) -> str:
    """The answer of permutations, with permutation matrices."""
    group = generated_tasks._GROUP
    size = range(generated_tasks.PERMUTED)
    product = [[int(i == j) for j in size] for i in size]
    for symbol in context[:-1]:
        one = group[generated_tasks.LETTERS.index(symbol)]
        matrix = [[int(one[j] == i) for j in size] for i in size]
        product = [[sum(matrix[i][m] * product[m][j] for m in size) for j in size] for i in size]
    found = tuple(next(i for i in size if product[i][j]) for j in size)
    return generated_tasks.LETTERS[group.index(found)]


@pytest.mark.parametrize(
    ("name", "solve"), [("hops", follow), ("chain", resolve), ("permutations", multiply)]
)
def test_answers_are_those_of_another_way_to_solve_it(name: str, solve: object) -> None:
    task = TASKS[name]
    answers = set()
    for k, problem in generated_tasks.problems(task, 300, KS, "test"):
        assert solve(problem.context) == problem.answer, (k, problem)  # type: ignore[operator]
        assert problem.answer in task.answers
        answers.add(problem.answer)
    assert len(answers) > 0.9 * len(task.answers)


def test_one_step_less_gives_another_answer() -> None:
    """So the k-th step is needed; for chain, unless 0 is added."""
    draw = random.Random(1)
    for k in KS:
        problem = generated_tasks.hops(draw, k)
        context = (*problem.context[:-2], NUMBERS[k - 1], "=")
        assert follow(context) != problem.answer


def test_every_symbol_is_one_token(tmp_path: Path) -> None:
    size = generated_tasks.write_tokenizer(tmp_path / "tokenizer.model")
    tokenizer = open_tokenizer(tmp_path / "tokenizer.model")
    draw = random.Random(1)
    for task in TASKS.values():
        problem = task.make(draw, 6)
        symbols = (*problem.context, problem.answer)
        encoded = tokenizer.encode(text(symbols))
        assert len(encoded) == len(symbols) < 64
        assert max(encoded) < size
        assert tokenizer.encode(text(symbols[:-1])) == encoded[:-1]


def test_the_files_are_the_same_every_time_and_evaluation_reads_them(tmp_path: Path) -> None:
    config = small_config(data__cache_dir=str(tmp_path / "cache"), data__seq_length=64)
    study = depth_tasks.study(config, Axes((), (8, 16)), largest=2)
    assert len(study.points) == 3 * 2 * 2
    files = (tmp_path / "cache" / depth_tasks.FOLDER).rglob("*.*")
    found = {path: path.read_bytes() for path in files}
    depth_tasks.study(config, Axes((), (8,)), largest=2)
    assert found == {path: path.read_bytes() for path in found}
    sections = config.model_dump(mode="json")
    sections["evaluation"] = {"every": 1, "tasks": study.points[0].overrides["evaluation.tasks"]}
    first, second = requests.find(type(config).model_validate(sections).evaluation)
    documents = requests.read(first)
    assert len(documents) == depth_tasks.QUESTIONS
    assert len(documents[0].choices) == 16
    assert second.name == "hops_k2"


def test_only_the_answer_counts_in_the_loss(tmp_path: Path) -> None:
    config = small_config(data__cache_dir=str(tmp_path), data__seq_length=64)
    study = depth_tasks.study(config, Axes((), (8,)), largest=3, documents=20)
    folder = tmp_path / depth_tasks.FOLDER
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    template = Path(study.points[0].overrides["data.chat_template"]).read_text(encoding="utf-8")
    with ChatTokenizer(tokenizer, template, "") as chat:
        for task in TASKS.values():
            (source,) = next(
                point.overrides["data.sources"]
                for point in study.points
                if point.labels["task"] == task.name
            )
            lines = Path(source["path"][0]).read_text(encoding="utf-8").splitlines()
            made = generated_tasks.problems(task, 20, range(1, 4), "training")
            lengths = []
            for line, (_k, one) in zip(lines, made, strict=True):
                tokens, counts = chat.encode(json.loads(line)["messages"])
                whole = text((*one.context, one.answer))
                assert [*tokenizer.encode(whole), tokenizer.eod] == tokens.tolist()
                assert counts.tolist() == [*([False] * len(one.context)), True, False]
                lengths.append(len(tokens))
            assert max(lengths) == generated_tasks.longest(task, 3)


def test_sequences_must_hold_a_document(tmp_path: Path) -> None:
    config = small_config(data__cache_dir=str(tmp_path), data__seq_length=36)
    with pytest.raises(UserError, match=r"seq_length: 36 is too short for hops.* at least 37"):
        depth_tasks.study(config, Axes((), (8,)), ("permutations", "hops"), largest=2)
    assert not list(tmp_path.iterdir())


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    rows = [
        {
            "task": task,
            "rule": rule,
            "sub_layers": sub_layers,
            "loss": 2.0,
            "diverged": False,
            "seed": seed,
            "k1": 0.9,
            "k2": 0.5 + 0.1 * seed,
        }
        for task in TASKS
        for rule in ("keel", "pre_ln")
        for sub_layers in (8, 32)
        for seed in (0, 1)
    ]
    assert "| hops | 8 | keel | 2.000 ± 0.000 | 0.900 ± 0.000 | 0.550 ± 0.071 | 0.062 |" in (
        depth_tasks.table(rows)
    )
    depth_tasks.picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
