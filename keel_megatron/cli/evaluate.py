"""`keel evaluate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keel_megatron.cli.arguments import Json, ModelFolder, check_outputs
from keel_megatron.errors import UserError
from keel_megatron.evaluation.tasks import Choice, load_tasks
from keel_megatron.runtime.files import write_output
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank

if TYPE_CHECKING:
    from keel_megatron.inference.source import Source
    from keel_megatron.runtime.distributed import Runtime

    OpenModel = Callable[..., AbstractContextManager[tuple[Source, Runtime]]]

MODEL_PROCESSES = "--model-processes"
_OF_TASKS = ("include_path", "limit", "num_fewshot", "seed", "confirm_run_unsafe_code")
_OF_TEXTS = ("text_key", "stride")

_Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help="Tasks, groups, tags or patterns of lm-eval. Extra: evaluate.",
    ),
]
_IncludePath = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of further task files.")
]
_Limit = Annotated[
    float | None,
    typer.Option(metavar="N", help="Documents per task; below 1, a fraction. For quick trials."),
]
_Shots = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", help="Few-shot examples per question. Default: the task's own number."
    ),
]
_Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=2**32 - 1, metavar="N", help="Seed of examples and sampling. Default: lm-eval's."
    ),
]
_Code = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code", help="Run tasks that execute the code that the model writes."
    ),
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="File, folder or glob of text, in a format that `keel data build` reads; repeatable.",
    ),
]
_TextKey = Annotated[
    str, typer.Option(metavar="KEY", help="Key or column of the text in a record.")
]
_Stride = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Tokens by which the window over a long document moves. Default: half of the context.",
    ),
]
_Step = Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File for the results. --text: one line of JSON per document. --tasks: JSON.",
    ),
]
_BatchTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="Tokens per batch, including padding.")
]
_Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes on this machine that share the work. Default: --model-processes.",
    ),
]
_ModelProcesses = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes that share one model, as pipeline stages (with the run's tensor-parallel "
        "size if it divides them). For a model that does not fit on one device.",
    ),
]


def evaluate(
    context: typer.Context,
    model: ModelFolder,
    tasks: _Tasks = None,
    include_path: _IncludePath = None,
    limit: _Limit = None,
    num_fewshot: _Shots = None,
    seed: _Seed = None,
    confirm_run_unsafe_code: _Code = False,
    text: _Text = None,
    text_key: _TextKey = "text",
    stride: _Stride = None,
    step: _Step = None,
    out: _Out = None,
    as_json: Json = False,
    batch_tokens: _BatchTokens = 8192,
    processes: _Processes = None,
    model_processes: _ModelProcesses = 1,
) -> None:
    """Evaluate a model: lm-eval's benchmarks, or perplexity of texts.

    For texts also bits per byte, which can compare models with different tokenizers.
    """
    names = tuple(filter(None, map(str.strip, (tasks or "").split(","))))
    if bool(text) == bool(names):
        raise UserError("give --tasks NAME,... or --text PATH: what the model is evaluated on")
    _check_options(context, out, is_tasks=bool(names))
    choice = Choice(names, include_path, limit, num_fewshot, seed, confirm_run_unsafe_code)
    count = _all_processes(processes, model_processes)
    from keel_megatron.inference.source import config_of, opened

    loaded: dict[str, Any] | None = None
    if not is_rank():
        # A mistake is reported once, before any process has a model.
        config_of(model, model_processes, MODEL_PROCESSES)
        loaded = load_tasks(choice) if names else None
        if count > 1:
            sys.exit(launch(count, ["-m", "keel_megatron", *sys.argv[1:]]))
    open_model = partial(
        opened,
        model,
        step=step,
        processes=count,
        model_processes=model_processes,
        option=MODEL_PROCESSES,
    )
    if names:
        _on_tasks(model, open_model, choice, loaded, batch_tokens, out, as_json=as_json)
    else:
        given = (tuple(text or ()), text_key, stride, batch_tokens)
        _on_texts(model, open_model, given, out, as_json=as_json)


def _on_texts(
    model: Path,
    open_model: OpenModel,
    given: tuple[tuple[Path, ...], str, int | None, int],
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Score texts; print their perplexity, then write the file."""
    from keel_megatron.evaluation.text import Texts
    from keel_megatron.evaluation.text_report import report_texts

    texts = Texts(*given)
    with open_model() as (source, runtime):
        report = report_texts(model, source, runtime, texts, _say)
    if not _is_main():
        return
    print(report.json() if as_json else "\n".join(report.table()), flush=True)
    if out is not None:
        write_output("--out", out, report.lines())


def _on_tasks(
    model: Path,
    open_model: OpenModel,
    choice: Choice,
    loaded: dict[str, Any] | None,
    batch_tokens: int,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Evaluate on lm-eval's tasks; print, log and write the results."""
    from keel_megatron.evaluation.benchmarks import evaluate_benchmarks
    from keel_megatron.inference.source import is_checkpoint
    from keel_megatron.mlflow_delivery.sync import add_metrics

    found = evaluate_benchmarks(
        open_model, choice, loaded, is_main=_is_main(), batch_tokens=batch_tokens, say=_say
    )
    if found is None:
        return
    content = found.to_json(model, choice, ["keel", *sys.argv[1:]])
    print(content if as_json else "\n".join(found.table()), flush=True)
    try:
        if found.step is None or is_checkpoint(model):
            _say(f"{model}: not logged, because it is not a run's folder")
        else:
            _say(add_metrics(model, found.step, found.metrics(choice)))
    finally:  # an error of one does not lose the other
        if out is not None:
            write_output("--out", out, content + "\n")


def _check_options(context: typer.Context, out: Path | None, *, is_tasks: bool) -> None:
    """Refuse options that would have no effect, and a file that cannot be written.

    Raises:
        UserError: an option of --text is given with --tasks, or the other way round; or the file
            of --out cannot be written.
    """
    check_outputs({"--out": out})
    chosen, others = ("--tasks", _OF_TEXTS) if is_tasks else ("--text", _OF_TASKS)
    for name in others:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: it has no effect with {chosen}; leave it out")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _all_processes(processes: int | None, model_processes: int) -> int:
    """All processes.

    Raises:
        UserError: they are not whole models.
    """
    count = model_processes if processes is None else processes
    if count % model_processes:
        raise UserError(
            f"{MODEL_PROCESSES}: {model_processes} does not divide the {count} processes"
        )
    return count
