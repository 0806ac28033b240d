"""Task files of lm-eval over local data: multiple choice, whole texts and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

NAMES = ("local_choice", "local_text", "local_answer")
QUESTIONS: list[dict[str, Any]] = [
    {"question": question, "choices": choices, "gold": number % len(choices)}
    for number, (question, choices) in enumerate(
        [
            ("The parser reads", ["arguments", "a river", "the namespace of options"]),
            ("An action stores ", ["a value", "nothing"]),
            ("def add_argument(self, *args, **kwargs):\n   ", ["return action", "pass", "raise"]),
            ("Help is printed when", ["the user asks", "the program ends", "it rains", "never"]),
            ("usage: PROG [-h]", ["[--foo FOO]", "bar", "[--foo FOO] bar"]),
            ("The default is None " * 12, ["if absent", "always"]),
        ]
    )
]
TEXTS = [
    {"page": "This module is an optparse-inspired command-line parsing library."},
    {"page": "The parse_args() method returns a namespace. " * 9},
    {"page": "class ArgumentParser(_AttributeHolder, _ActionsContainer):\n    pass\n"},
]
ANSWERS = [
    {"prompt": "if usage is not None:", "answer": "pend/ to-"},
    {"prompt": "# Help-printing methods", "answer": "print"},
    {"prompt": "conflict_handler = self._get_handler()", "answer": "x"},
    {"prompt": "usage: %(prog)s [options] " * 5, "answer": "FILE"},
]


def write_tasks(folder: Path) -> Path:
    """A folder of task files and their data, for `--include-path`."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder,
        "local_choice",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{gold}}",
        fewshot_split="test",
        metric_list=[_mean("acc"), _mean("acc_norm")],
    )
    _write(
        folder,
        "local_text",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[
            {"metric": name, "aggregation": kind, "higher_is_better": False}
            for name, kind in (
                ("word_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
    )
    _write(
        folder,
        "local_answer",
        ANSWERS,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", "('"], "max_gen_toks": 6, "do_sample": False},
        num_fewshot=0,  # which lm-eval lets nobody change
        metric_list=[_mean("exact_match")],
    )
    group = {
        "group": "local_group",
        "task": ["local_choice"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2.0},
    }
    (folder / "local_group.yaml").write_text(yaml.safe_dump(group))
    return folder


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _write(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "metadata": {"version": 1.0},
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
