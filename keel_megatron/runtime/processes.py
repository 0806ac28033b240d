"""Default number of processes of a run on this machine. Does not import torch."""

from __future__ import annotations

import os
from pathlib import Path

from keel_megatron.config.checks import fits
from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.cores import available_cores

_DEVICES = Path("/dev")


def with_processes(
    path: Path, overrides: tuple[str, ...], processes: int = 0
) -> tuple[RunConfig, int]:
    """Load a configuration and check it against the number of processes.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each.
        processes: number of processes; 0: `default_processes`.

    Raises:
        ConfigError: the configuration has errors; it lists all of them.
    """
    config = load_config(path, overrides, world_size=processes or None)
    if not processes:
        processes = default_processes(config)
        load_config(path, overrides, world_size=processes)
    return config, processes


def default_processes(config: RunConfig) -> int:
    """The processes of one replica, times the number of replicas that this machine has devices for.

    A device is a GPU; without GPUs, a CPU core or `training.threads` cores. The number of replicas
    divides the global batch. It is at least 1, even if processes then share cores.
    """
    replica = config.parallel.model_parallel_size
    for replicas in range(_devices(config) // replica, 1, -1):
        if fits(config, replica * replicas):
            return replica * replicas
    return replica


def is_rank() -> bool:
    """Whether a launcher such as torchrun has started this process as one of a group."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def _devices(config: RunConfig) -> int:
    gpus = 0 if config.training.device == "cpu" else count_gpus()
    if gpus is None:
        return 0
    return gpus or available_cores() // max(1, config.training.threads)


def count_gpus(devices: Path = _DEVICES) -> int | None:
    """Number of GPUs visible to this process; None: an unknown number.

    Counted from the driver's device files (a container has only its own) and CUDA_VISIBLE_DEVICES;
    importing torch would take seconds.

    Args:
        devices: the folder of device files, for tests.
    """
    if (devices / "dxg").exists():  # Windows' subsystem for Linux
        return None
    found = sum(path.name[len("nvidia") :].isdecimal() for path in devices.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or visible is None:
        return found
    names = [name.strip() for name in visible.split(",")]
    for number, name in enumerate(names):  # CUDA stops at the first invalid entry
        if not name or name.startswith("-"):
            return number
    # A part of a GPU (MIG) is a device of its own.
    return len(names) if visible.startswith("MIG") else min(found, len(names))
