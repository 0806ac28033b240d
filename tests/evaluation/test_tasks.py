"""Finding and loading lm-eval's tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import yaml
from keel_megatron.errors import UserError
from keel_megatron.evaluation.tasks import Choice, load_tasks, require_harness
from keel_megatron.inference import parity

PAPER = Path(__file__).parents[2] / "yaml" / "evaluation"
BENCHMARKS = 14
FOLDERS = (
    *("agieval", "arc", "ceval", "cmmlu", "commonsense_qa", "gsm8k", "hellaswag", "humaneval"),
    *("lambada", "mbpp", "mmlu/default", "piqa", "winogrande"),
)

parity.require_transformers()  # before anything imports it: no network


@pytest.fixture(scope="module")
def index() -> Any:
    """Ours and those of lm-eval's folders that are needed: all of them take seconds to read."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [PAPER, *(own / name for name in FOLDERS)]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)


def test_the_papers_benchmarks_are_tasks_of_lm_eval(index: Any) -> None:
    group = index.task_index["keel_paper"]
    names = group.cfg["task"]
    assert len(set(names)) == BENCHMARKS
    kinds = {name: index.task_index[name].kind.name for name in names}
    assert set(kinds.values()) == {"TASK", "GROUP"}
    left = list(names)
    while left:  # groups of groups
        entry = index.task_index[left.pop()]
        if entry.kind.name == "GROUP":
            left += [part if isinstance(part, str) else part["task"] for part in entry.cfg["task"]]


def test_an_unknown_name_is_told_with_what_is_near(
    index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: index)
    with pytest.raises(UserError, match=r"no task, group or tag arc_esay; near it: arc_easy[,;]"):
        load_tasks(Choice(("arc_esay",)))
    wanted = r"arc_easy, which wants the data set allenai/ai2_arc, cannot be loaded: .*--include-"
    with pytest.raises(UserError, match=wanted):
        load_tasks(Choice(("arc_easy",)))


def test_a_folder_that_has_all_names_is_read_alone(
    local_tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    made: list[dict[str, Any]] = []
    real = lm_eval.tasks.TaskManager

    def manager(**settings: Any) -> Any:
        made.append(settings)
        return real(**{**settings, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    tasks = load_tasks(Choice(("local_group", "local_t*"), local_tasks, shots=3))
    assert [one.get("include_defaults") for one in made] == [False, None], "a pattern may match any"
    assert list(tasks["tasks"]) == ["local_choice", "local_text"]
    assert list(tasks["groups"]) == ["local_group"]
    made.clear()
    assert list(load_tasks(Choice(("local_group",), local_tasks))["tasks"]) == ["local_choice"]
    assert len(made) == 1
    with pytest.raises(UserError, match=r"Duplicate task 'local_choice'"):
        load_tasks(Choice(("local_group", "local_choice"), local_tasks))
    with pytest.raises(UserError, match=r"--include-path: there is no folder nowhere"):
        load_tasks(Choice(("local_choice",), Path("nowhere")))


def test_the_number_of_examples(local_tasks: Path) -> None:
    names = ("local_choice", "local_answer")
    own = load_tasks(Choice(names, local_tasks))["tasks"]
    assert [own[name].get_config("num_fewshot") for name in names] == [0, 0]
    three = load_tasks(Choice(names, local_tasks, shots=3))["tasks"]
    assert [three[name].get_config("num_fewshot") for name in names] == [3, 0]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(("x",), shots=-1), "--num-fewshot: -1 must be at least 0"),
        (Choice(("x",), seed=-1), r"--seed: -1 must be from 0 to 2\^32 - 1"),
        (Choice(("x",), seed=2**32), r"--seed: 4294967296 must be from 0 to 2\^32 - 1"),
    ],
)
def test_numbers_out_of_range(choice: Choice, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tasks(choice)


def test_code_is_executed_only_if_that_is_confirmed(local_tasks: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((local_tasks / "local_answer.yaml").read_text())
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**task, "task": "x", "unsafe_code": True}))
    with pytest.raises(UserError, match=r"--tasks: x would execute .* --confirm-run-unsafe-code"):
        load_tasks(Choice(("x",), tmp_path))
    assert list(load_tasks(Choice(("x",), tmp_path, unsafe_code=True))["tasks"]) == ["x"]


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'keel-megatron\[evaluate\]'"):
        require_harness()
