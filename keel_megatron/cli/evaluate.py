"""`keel evaluate`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.errors import UserError
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank

MODEL_PROCESSES = "--model-processes"

_Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a run, runs/NAME, or of a checkpoint, or a Hugging Face folder.",
    ),
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="File, folder or glob of text, of the formats that `keel data build` reads; "
        "repeatable.",
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
    Path | None, typer.Option(metavar="FILE", help="Write a line of JSON a document to this file.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]
_BatchTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="Tokens of a batch, padding included.")
]
_Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes of this machine, which share the work. Default: --model-processes.",
    ),
]
_ModelProcesses = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes that share one model: pipeline stages, of the run's tensor-parallel size "
        "if it divides them. For a model that does not fit one device.",
    ),
]


def evaluate(
    model: _Model,
    text: _Text = None,
    text_key: _TextKey = "text",
    stride: _Stride = None,
    step: _Step = None,
    out: _Out = None,
    as_json: _Json = False,
    batch_tokens: _BatchTokens = 8192,
    processes: _Processes = None,
    model_processes: _ModelProcesses = 1,
) -> None:
    """Evaluate a model: perplexity and bits per byte of texts."""
    if not text:
        raise UserError("--text: name a text; `keel evaluate --help` lists the options")
    count = _all_processes(processes, model_processes)
    if count > 1 and not is_rank():
        from keel_megatron.inference.source import config_of

        # A mistake is reported once, not by every process.
        config_of(model, model_processes, MODEL_PROCESSES)
        sys.exit(launch(count, ["-m", "keel_megatron", *sys.argv[1:]]))
    from keel_megatron.evaluation.text import Texts
    from keel_megatron.evaluation.text_report import report_texts
    from keel_megatron.inference.source import opened

    texts = Texts(tuple(text), text_key, stride, batch_tokens)
    say = partial(print, file=sys.stderr, flush=True)
    with opened(
        model,
        step=step,
        processes=count,
        model_processes=model_processes,
        option=MODEL_PROCESSES,
    ) as (source, runtime):
        report = report_texts(model, source, runtime, texts, out, say)
    if os.environ.get("RANK", "0") == "0":
        print(report.json() if as_json else "\n".join(report.table()))


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
