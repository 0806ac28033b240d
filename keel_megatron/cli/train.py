"""`keel train`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from keel_megatron.cli.arguments import ConfigPath, Overrides
from keel_megatron.runtime import exit_codes


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option(min=0, help="Start so many processes on this machine, as torchrun does.")
    ] = 0,
    max_restarts: Annotated[
        int,
        typer.Option(min=0, help="With --processes: start a group that fails so often again."),
    ] = 0,
) -> None:
    """Train a run, or go on with it from its newest checkpoint.

    Several processes: --processes N on this machine, or
    torchrun ... -m keel_megatron train CONFIG on one or many.
    """
    settings = tuple(overrides or ())
    if processes:
        from keel_megatron.config.load import load_config
        from keel_megatron.runtime.local_launch import launch

        load_config(config, settings, world_size=processes)
        command = ["-m", "keel_megatron", "train", str(config), *settings]
        sys.exit(launch(processes, command, max_restarts))
    from keel_megatron.training.run import run_training

    outcome = run_training(config, settings)
    if outcome.is_main and outcome.exit_code == exit_codes.DONE:
        from keel_megatron.inference.sample import sample_run

        sample_run(outcome.folder, again=outcome.trained)
    sys.exit(exit_codes.for_torchrun(outcome.exit_code))
