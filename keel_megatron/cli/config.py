"""`keel config`."""

from __future__ import annotations

import json

import typer

from keel_megatron.cli.arguments import ConfigPath, Overrides
from keel_megatron.cli.console import print_path

app = typer.Typer(help="Show configurations.", no_args_is_help=True)


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
