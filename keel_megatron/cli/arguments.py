"""The arguments that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, runs/NAME.")]
