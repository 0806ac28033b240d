"""How many processes a run has on this machine, unless its user says so. No torch here."""

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
    """A configuration, checked against the number of processes that will be started here.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each.
        processes: how many; 0 = `default_processes`.

    Raises:
        ConfigError: with everything that is wrong.
    """
    config = load_config(path, overrides, world_size=processes or None)
    if not processes:
        processes = default_processes(config)
        load_config(path, overrides, world_size=processes)
    return config, processes


def default_processes(config: RunConfig) -> int:
    """Those of one replica of the model, times the replicas that this machine has devices for.

    A device is a GPU, or without any a CPU core, or `training.threads` of them. There are only as
    many replicas as divide the global batch evenly. One replica is started in any case, even if it
    has to share cores.
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
    """GPUs that a process started now would see; None = there are some, who knows how many.

    From the driver's device files, of which a container has only its own, and
    CUDA_VISIBLE_DEVICES: torch itself would take seconds to say.

    Args:
        devices: the folder of device files; tests make one.
    """
    if (devices / "dxg").exists():  # Windows' subsystem for Linux
        return None
    found = sum(path.name[len("nvidia") :].isdecimal() for path in devices.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or visible is None:
        return found
    names = [name.strip() for name in visible.split(",")]
    for number, name in enumerate(names):  # CUDA stops at the first that it cannot take
        if not name or name.startswith("-"):
            return number
    # A part of a GPU (MIG) is a device of its own.
    return len(names) if visible.startswith("MIG") else min(found, len(names))
