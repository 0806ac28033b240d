"""`keel config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import ConfigPath, Overrides
from keel_megatron.cli.choices import one_of
from keel_megatron.cli.console import print_path
from keel_megatron.cli.help import App
from keel_megatron.config.bundled import FOLDER, bundled_names
from keel_megatron.errors import UserError

app = App(help="Show configurations, and copy bundled ones.")


@app.command("show")
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration, or all errors in it."""
    from keel_megatron.config.load import dump_config, load_config

    print(dump_config(load_config(config, overrides or ())), end="")


@app.command("folder")
def folder(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the run's folder, for scripts, or all errors in the configuration."""
    from keel_megatron.config.load import load_config

    print_path(load_config(config, overrides or ()).training.folder)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of configurations, for editors."""
    from keel_megatron.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command("list")
def list_() -> None:
    """List the bundled configurations. Each is a CONFIG: keel train demo."""
    for name in bundled_names():
        print(name)


@app.command("copy")
def copy(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A name of `keel config list`.", **one_of(bundled_names)
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Default: NAME.yaml in this folder.")
    ] = None,
) -> None:
    """Copy a bundled configuration to a file, to edit it."""
    file = file or Path(f"{Path(name).name}.yaml")
    try:
        with file.open("xb") as stream:  # an existing file is kept
            stream.write((FOLDER / f"{name}.yaml").read_bytes())
    except OSError as error:
        raise UserError(f"FILE: {file} cannot be written: {error.strerror}") from error
    print_path(file)
