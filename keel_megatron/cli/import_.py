"""`keel import`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Hugging Face folder: an exported one, or a Llama model's."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="RUN", help="Run folder to write; must not exist, or be empty."),
    ],
) -> None:
    """Write a run's folder with the weights of a Hugging Face folder, as its step 0."""
    from keel_megatron.huggingface.importing import import_folder

    import_folder(folder, Path(os.path.abspath(out)), print)
