"""`keel train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import ConfigPath, Overrides
from keel_megatron.cli.console import outlive_full_disk
from keel_megatron.runtime import exit_codes, ownership
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.parent import end_with_study
from keel_megatron.runtime.processes import is_rank, with_processes
from keel_megatron.training import startup
from keel_megatron.training.stop import stop_requests


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of processes to start on this machine, as torchrun does. 0: one replica "
            "of the layout for each group of available GPUs or CPU cores.",
        ),
    ] = 0,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Maximum restarts of the process group after failures.")
    ] = 0,
) -> None:
    """Train a run, or resume it from its newest checkpoint.

    The command starts its processes itself, on this machine. On several machines:
    torchrun ... -m keel_megatron train CONFIG.
    """
    outlive_full_disk()
    settings = tuple(overrides or ())
    if is_rank() and not processes:
        sys.exit(_train_here(config, settings))
    sys.exit(_start(config, settings, processes, max_restarts))


def _start(path: Path, settings: tuple[str, ...], processes: int, max_restarts: int) -> int:
    """Run the checks that do not need torch, then start the ranks; returns the exit code."""
    end_with_study()
    config, processes = with_processes(path, settings, processes)
    startup.check(config)
    with ownership.take(config.training.folder) as owned:
        newest = startup.complete(config)
        if newest is not None:
            print(startup.complete_text(config, newest), flush=True)
            exit_codes.write(config.training.folder, exit_codes.DONE)
            _sample(config.training.folder, config.tracking.uri, again=False)
            return exit_codes.DONE
        layout = config.parallel
        starting = (
            f"starting {processes} process(es) on this machine: TP {layout.tensor} x PP "
            f"{layout.pipeline} x DP {processes // layout.model_parallel_size}"
        )
        if processes == 1 and not max_restarts:
            _say(starting)
            return _train_here(path, settings, owned)
        with stop_requests(starting=True):
            from keel_megatron.training.dataset import DATASET, ready_dataset

            dataset = ready_dataset(config, _say, on_one_machine=True)
        _say(starting)
        command = ["-m", "keel_megatron", "train", str(path), *settings]
        variables = {DATASET: str(dataset)}
        return launch(processes, command, max_restarts, owned, variables, saves=True)


def _say(text: str) -> None:
    print(text, flush=True)


def _train_here(
    path: Path, settings: tuple[str, ...], owned: ownership.Ownership | None = None
) -> int:
    """Train in this process, as a rank or alone; returns the exit code."""
    with stop_requests(starting=True) as stop:
        from keel_megatron.training.run import run_training

        outcome = run_training(path, settings, owned=owned, stop=stop)
    if outcome.is_main and outcome.exit_code == exit_codes.DONE:
        _sample(outcome.folder, outcome.uri, again=outcome.trained)
    return exit_codes.for_torchrun(outcome.exit_code)


def _sample(folder: Path, uri: str | None, *, again: bool) -> None:
    from keel_megatron.inference.sample import sample_run

    sample_run(folder, uri, again=again)
