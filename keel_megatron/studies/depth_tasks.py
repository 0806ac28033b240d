"""Accuracy on tasks that need k sequential steps, over k, for several rules and depths.

Each run trains on one task from scratch; its accuracy on questions of each k is measured after its
last step by `evaluation.tasks`. What a block cannot do in one step, a deeper model can do in more.
Only the answers count in the loss, and no document sees another, as in the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole
from keel_megatron.studies import pictures
from keel_megatron.studies.generated_tasks import (
    LARGEST,
    TASKS,
    TEMPLATE,
    Task,
    longest,
    write_evaluation,
    write_tokenizer,
    write_training,
)
from keel_megatron.studies.grid import Axes, Label, Point, Row, Study, depth
from keel_megatron.studies.results import groups, markdown, spread
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.records import EVALUATION
from keel_megatron.tracking.run_log import METRICS_FILE

RULES = ("keel", "pre_ln")
STEPS = 6
"""The largest k, unless another is given."""
QUESTIONS = 200
"""Questions of each k, unless another number is given: a standard error of at most 3.5 points."""
DOCUMENTS = 50_000
FOLDER = "depth-tasks"


def study(
    config: RunConfig,
    axes: Axes,
    tasks: Sequence[str] = tuple(TASKS),
    largest: int = STEPS,
    documents: int = DOCUMENTS,
    questions: int = QUESTIONS,
) -> Study:
    """The study's grid. Writes the tasks into data.cache_dir, the same files every time.

    Args:
        config: the configuration of all runs.
        axes: rules (default: keel and pre_ln) and depths.
        tasks: names, of `TASKS`.
        largest: the largest k.
        documents: of each task's training text.
        questions: of each k.

    Raises:
        UserError: k is too large, sequences are too short for a task's documents, or a file cannot
            be written.
    """
    if not 1 <= largest <= LARGEST:
        raise UserError(f"--largest: {largest} must be from 1 to {LARGEST}")
    _check_lengths(config, tasks, largest)
    written = _write(config, tasks, largest, documents, questions)

    def point(task: str, rule: str, sub_layers: int) -> Point:
        """One task, rule and depth."""
        overrides: dict[str, Any] = {"model.residual": rule, **depth(sub_layers), **written[task]}
        overrides["evaluation.every"] = config.training.steps
        labels: dict[str, Label] = {"task": task, "rule": rule, "sub_layers": sub_layers}
        return Point(f"{task}-{rule}-{sub_layers}", overrides, labels)

    points = [
        point(task, rule, sub_layers)
        for task in tasks
        for sub_layers in axes.depths
        for rule in axes.rules or RULES
    ]
    return Study("depth-tasks", points, table, picture, lambda _point, run: row(run))


def _check_lengths(config: RunConfig, tasks: Sequence[str], largest: int) -> None:
    """Refuse sequences in which a document does not fit.

    Raises:
        UserError: that.
    """
    length = config.data.seq_length
    for name in tasks:
        needed = longest(TASKS[name], largest) - 1  # the last token is a label only
        if needed > length:
            raise UserError(
                f"data.seq_length: {length} is too short for {name} with {largest} steps; it must "
                f"be at least {needed}, or --largest smaller"
            )


def _write(
    config: RunConfig, tasks: Sequence[str], largest: int, documents: int, questions: int
) -> dict[str, dict[str, Any]]:
    """Write the tasks' files; for each task the settings with which a run uses them.

    Raises:
        UserError: a file cannot be written.
    """
    folder = config.data.cache_dir / FOLDER
    template = folder / "template.jinja"
    try:
        vocabulary = write_tokenizer(folder / "tokenizer.model")
        write_whole(template, TEMPLATE)
        files = {
            name: _write_task(folder, TASKS[name], largest, documents, questions) for name in tasks
        }
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {error.filename or folder}: {error.strerror}"
        ) from error
    return {
        name: {
            "data.text": None,
            "data.sources": [{"name": name, "path": [str(training)], "format": "chat"}],
            "data.tokenizer": str(folder / "tokenizer.model"),
            "data.chat_template": str(template),
            "data.document_masks": True,
            "data.vocab_size": vocabulary,
            "evaluation.tasks": [str(path) for path in asked],
        }
        for name, (training, asked) in files.items()
    }


def _write_task(
    folder: Path, task: Task, largest: int, documents: int, questions: int
) -> tuple[Path, list[Path]]:
    """Write a task's training text, and a file of questions of each k."""
    training = folder / f"{task.name}-{largest}-{documents}.jsonl"
    write_training(training, task, documents, range(1, largest + 1))
    asked = []
    for k in range(1, largest + 1):
        # A file's name is its task's name among the metrics.
        asked.append(folder / f"questions-{questions}" / f"{task.name}_k{k}.jsonl")
        asked[-1].parent.mkdir(exist_ok=True)
        write_evaluation(asked[-1], task, questions, k)
    return training, asked


def row(folder: Path) -> dict[str, Any]:
    """Accuracy of each k: `k1`, `k2`, ...; from the run's last evaluation."""
    found: dict[str, Any] = {}
    for record in iterate_metrics(folder / METRICS_FILE):
        for name, value in record.items():
            if name.startswith(EVALUATION) and name.endswith("/acc"):
                task = name.removeprefix(EVALUATION).removesuffix("/acc")
                found[task.rpartition("_")[2]] = value
    return found


def _ks(rows: Sequence[Row]) -> list[int]:
    names = {name for row in rows for name in row if name[:1] == "k" and name[1:].isdecimal()}
    return sorted(int(name[1:]) for name in names)


def table(rows: Sequence[Row]) -> str:
    """One line per task, rule and depth: accuracy of each k, and of a guess."""
    ks = _ks(rows)
    lines = []
    for (task, sub_layers, rule), found in groups(rows, "task", "sub_layers", "rule").items():
        shown = [spread(found, f"k{k}") for k in ks]
        guess = f"{1 / len(TASKS[task].answers):.3f}"
        lines.append([task, sub_layers, rule, spread(found), *shown, guess])
    columns = [
        "task",
        "sub-layers",
        "rule",
        "loss of the answer",
        *(f"k = {k}" for k in ks),
        "guess",
    ]
    return markdown(columns, lines)


def picture(rows: Sequence[Row], out: Path) -> None:
    """Accuracy over k, one panel per task, one line per rule and depth; dotted: a guess."""
    by_task = groups(rows, "task")
    figure, panels = pictures.new_figure(
        "Accuracy on tasks of k sequential steps", len(by_task), pictures.seeds_note(rows)
    )
    ks = _ks(rows)
    for axes, ((task,), found) in zip(panels, by_task.items(), strict=True):
        depths = sorted({row["sub_layers"] for row in found})
        for (rule, sub_layers), some in groups(found, "rule", "sub_layers").items():
            marker = pictures.MARKERS[depths.index(sub_layers) % len(pictures.MARKERS)]
            values = [spread(some, f"k{k}") for k in ks]
            label = f"{rule}, L = {sub_layers}"
            pictures.curve(axes, ks, values, label, pictures.rule_colour(rule), marker)
        axes.axhline(1 / len(TASKS[task].answers), linestyle=":", color="#718096")
        axes.set_title(f"{task}: {TASKS[task].what}", loc="left", fontsize=11)
        axes.set_xlabel("k, steps of a question")
        axes.set_xticks(ks)
        axes.set_ylim(-0.02, 1.02)
    panels[0].set_ylabel("accuracy")
    pictures.shared_legend(figure)
    pictures.finish(figure, out, legend=False)
