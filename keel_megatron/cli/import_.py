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
    """Create a run's folder from a Hugging Face folder.

    The weights become the run's checkpoint of step 0. Another run can start from it
    (training.initialize_from).
    """
    from keel_megatron.huggingface.importing import import_folder

    import_folder(folder, Path(os.path.abspath(out)), print)
