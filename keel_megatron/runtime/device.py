"""The device of this process, chosen once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from keel_megatron.config.errors import UserError
from keel_megatron.runtime.cores import available_cores


@dataclass(frozen=True)
class Launch:
    """Who this process is among those that torchrun started (one alone without torchrun)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read torchrun's variables; DeepSpeed's launcher calls the last one LOCAL_SIZE."""
        local = "LOCAL_SIZE" if "LOCAL_WORLD_SIZE" not in os.environ else "LOCAL_WORLD_SIZE"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local)
        values = []
        for name, default in zip(names, (0, 1, 0, 1), strict=True):
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise UserError(
                    f"environment variable {name}={text!r} must be a whole number; "
                    "start the run with torchrun"
                )
            values.append(int(text))
        return cls(*values)


def choose_device(preference: Literal["auto", "cuda", "cpu"], local_rank: int) -> torch.device:
    """The device that `training.device` means for the process `local_rank` of this node.

    Raises:
        UserError: CUDA is asked for and absent, or has fewer devices than processes.
    """
    available = torch.cuda.is_available()
    if preference == "cuda" and not available:
        raise UserError(
            "training.device: cuda is asked for, but torch sees no CUDA device "
            "(auto or cpu would use the CPU)"
        )
    if preference == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"training.device: process {local_rank} of this node has no CUDA device of its own; "
            f"there are {count}: start at most {count} processes a node"
        )
    return torch.device("cuda", local_rank)


def set_threads(threads: int, local_world_size: int) -> int:
    """Set and return the CPU threads of this process; 0 shares the node's cores evenly."""
    count = threads or max(1, available_cores() // local_world_size)
    torch.set_num_threads(count)
    return count
