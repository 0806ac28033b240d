"""`keel generate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli.arguments import ModelFolder
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import check_output
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank

if TYPE_CHECKING:
    from keel_megatron.inference.generate import Completion

_Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text to continue; shown as it is generated.")
]
_Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='Texts to continue: one per line, or a .jsonl file of strings or {"prompt": TEXT}. '
        "The output is JSON lines.",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File for the output, as JSON lines; replaced if it exists."),
]
_Step = Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")]
_Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the continuation before this text; repeatable."),
]
_Slide = Annotated[
    bool,
    typer.Option(
        "--slide",
        help="At the end of the context, continue with its newest half, which is read again. "
        "Otherwise the continuation ends there.",
    ),
]
_Processes = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that share the model, as pipeline stages (with the run's tensor-parallel "
        "size if it divides them). For a model that does not fit on one device.",
    ),
]
_Graphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs",
        help="Replay one CUDA graph per token, for deep models. Needs a GPU, and one process.",
    ),
]
_Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Treat each prompt as a user's message, and answer it with the chat template that "
        "the model was trained with.",
    ),
]


def generate(
    model: ModelFolder,
    prompt: _Prompt = None,
    prompts: _Prompts = None,
    out: _Out = None,
    step: _Step = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature. 0: greedy decoding.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: probability mass to sample from.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
    stop: _Stop = None,
    slide: _Slide = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    processes: _Processes = 1,
    cuda_graphs: _Graphs = False,
    chat: _Chat = False,
) -> None:
    """Generate text with a run, a checkpoint or a Hugging Face folder."""
    from keel_megatron.inference.prompts import read_prompts

    is_main = processes == 1 or os.environ.get("RANK", "0") == "0"
    if (prompt is None) == (prompts is None):
        raise UserError("--prompt: give either --prompt TEXT or --prompts FILE")
    if cuda_graphs and processes > 1:
        raise UserError("--cuda-graphs: only one process can use them; leave out --processes")
    if out is not None and is_main:
        check_output("--out", out)
    texts = read_prompts(prompts) if prompts is not None else [prompt or ""]
    from keel_megatron.inference.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()), slide)
    if processes > 1 and not is_rank():
        from keel_megatron.inference.source import config_of

        config_of(model, processes)  # a mistake is reported once, not by every process
        sys.exit(launch(processes, ["-m", "keel_megatron", *sys.argv[1:]]))
    from keel_megatron.inference.generate import generate_prompts

    streams = prompts is None and out is None
    done: dict[int, Completion] = {}
    with _shown(done, len(texts), out, streamed=streams, is_main=is_main):
        _completions, speed = generate_prompts(
            model,
            texts,
            sampling,
            step=step,
            batch_size=batch_size,
            processes=processes,
            cuda_graphs=cuda_graphs,
            chat=chat,
            say=partial(print, end="", flush=True) if streams else None,
            done=done.__setitem__,
        )
    if is_main:
        print(speed.line(), file=sys.stderr)


@contextmanager
def _shown(
    done: dict[int, Completion], total: int, out: Path | None, *, streamed: bool, is_main: bool
) -> Iterator[None]:
    """Context after which what is done is printed or written, also after Ctrl-C or an error."""
    try:
        yield
    except BaseException:
        if is_main and done:
            print(f"stopped: {len(done)} of {total} prompts are continued", file=sys.stderr)
            _show(done, out, streamed=streamed)
        raise
    if is_main:
        _show(done, out, streamed=streamed)


def _show(done: dict[int, Completion], out: Path | None, *, streamed: bool) -> None:
    """Print or write what has not been streamed, and say why the continuations ended."""
    from keel_megatron.inference.prompts import json_lines, write_out

    completions = [done[number] for number in sorted(done)]
    if streamed:
        print(flush=True)
    elif out is None:
        print(json_lines(completions), end="", flush=True)
    else:
        write_out(out, completions)
    for reason in sorted({one.ended for one in completions}):
        count = sum(one.ended == reason for one in completions)
        hint = " (data.seq_length; --slide continues)" if reason == "end of context" else ""
        which = "" if len(completions) == 1 else f"{count} x "
        print(f"ended: {which}{reason}{hint}", file=sys.stderr)
