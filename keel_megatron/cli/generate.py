"""`keel generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run's folder, runs/NAME, or one of its checkpoints."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 = always the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens that hold this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a prompt with the newest checkpoint of a run, or with the one given."""
    from keel_megatron.inference.generate import generate_from_run

    print(
        generate_from_run(
            run,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    )
