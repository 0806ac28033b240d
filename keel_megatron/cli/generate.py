"""`keel generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run, runs/NAME, or of a checkpoint."),
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature. 0: greedy decoding.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: probability mass to sample from.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 0,
) -> None:
    """Generate text from a run's newest checkpoint, or from a given checkpoint."""
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
