"""The arguments that verbs share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.config.errors import UserError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, runs/NAME.")]


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """What is written within goes where an option says.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from error
