"""`keel doctor`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli.arguments import (
    Json,
    Overrides,
    only_json,
    print_json,
    show_old_names,
)
from keel_megatron.cli.completion import configurations
from keel_megatron.cli.console import print_report

if TYPE_CHECKING:
    from keel_megatron.cluster.doctor import Component
    from keel_megatron.config.run import RunConfig
    from keel_megatron.runtime.device import Launch


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file of the run's configuration.",
            callback=show_old_names,
            autocompletion=configurations,
        ),
    ] = None,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option(min=0, help="Test CONFIG with this number of processes on this machine.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Show what is installed here; with CONFIG, also test the nodes.

    For each library and device: its version, and whether a run would use it.

    On the nodes of a run: torchrun ... -m keel_megatron doctor CONFIG, or a launcher of launchers/
    with --doctor.
    """
    from keel_megatron.config.load import load_config
    from keel_megatron.runtime.device import Launch

    if processes:
        more = ["--json"] if as_json else []
        sys.exit(_on_this_machine(config, tuple(overrides or ()), processes, more))
    launch = Launch.from_environment()
    run = None
    if config is not None:
        # A single process checks only its machine; the launch checks the layout.
        size = launch.world_size if "RANK" in os.environ else None
        run = load_config(config, tuple(overrides or ()), world_size=size)
    if launch.rank == 0:
        _show(run, as_json=as_json)
    if run is not None and "RANK" in os.environ:
        with only_json(as_json):
            _preflight(run, launch)


def _on_this_machine(
    config: Path | None, overrides: tuple[str, ...], processes: int, more: list[str]
) -> int:
    from keel_megatron.config.load import load_config
    from keel_megatron.errors import UserError
    from keel_megatron.runtime.local_launch import launch

    if config is None:
        raise UserError("--processes needs CONFIG: the configuration to test")
    load_config(config, overrides, world_size=processes)
    return launch(processes, ["-m", "keel_megatron", "doctor", str(config), *overrides, *more])


def _show(run: RunConfig | None, *, as_json: bool) -> None:
    from keel_megatron.cluster import doctor

    found, used = doctor.installed(), [*doctor.used(run), *_kernels(run)]
    if as_json:
        parts = {"found": list(map(asdict, found)), "used": list(map(asdict, used))}
        print_json({"machine": doctor.describe_machine(), **parts})
        return
    print(doctor.describe_machine())
    width = max(len(component.name) for component in [*found, *used])
    for title, components in (("found", found), ("used", used)):
        print(title)
        for component in components:
            print_report(f"  {component.name:<{width}}  {component.text}")
    for component in [*found, *used]:
        if component.warning is not None:
            print(f"warning: {component.warning}", file=sys.stderr)


def _kernels(run: RunConfig | None) -> list[Component]:
    import torch

    from keel_megatron.cluster.doctor import Component, device_type
    from keel_megatron.errors import UserError
    from keel_megatron.model.backend import choose_backend, describe_adam, describe_backend

    device = device_type(run)
    asked = "auto" if run is None else run.kernels.backend
    try:
        backend = Component(
            "kernels.backend", f"{asked}: {describe_backend(choose_backend(run, device))}"
        )
    except UserError as error:
        backend = Component("kernels.backend", f"{asked}: cannot be used", str(error))
    found = [backend, Component("Adam", describe_adam(run, device))]
    if run is not None:
        from keel_megatron.model.attention_kernel import describe_attention

        found.append(Component("attention", describe_attention(run, torch.device(device))))
    return found


def _preflight(run: RunConfig, launch: Launch) -> None:
    from keel_megatron.cluster import doctor, preflight
    from keel_megatron.runtime.distributed import start

    with start(run.parallel, run.training, launch, doctor.facts(run)) as runtime:
        for line in preflight.check(run, runtime):
            if runtime.is_main:
                print(line, flush=True)
        runtime.barrier()
