"""The device of this process, chosen once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from keel_megatron.errors import UserError
from keel_megatron.runtime.cores import available_cores


@dataclass(frozen=True)
class Launch:
    """Rank and world size of this process, from torchrun (1 process without torchrun)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read torchrun's variables; DeepSpeed's launcher calls the last one LOCAL_SIZE.

        Raises:
            UserError: the variables are inconsistent, or one is missing.
        """
        local = "LOCAL_SIZE" if "LOCAL_WORLD_SIZE" not in os.environ else "LOCAL_WORLD_SIZE"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local)
        rank, size, local_rank, local_size = (
            _number(name, default) for name, default in zip(names, (0, 1, 0, 1), strict=True)
        )
        for name, value, limit, of in (
            ("RANK", rank, size, "WORLD_SIZE"),
            ("LOCAL_RANK", local_rank, local_size, local),
            (local, local_size, size + 1, "WORLD_SIZE + 1"),
        ):
            if value >= limit:
                raise _odd(f"{name}={value} must be below {of}={limit}")
        if size > 1:
            missing = [name for name in (*names, *_MEETING) if not os.environ.get(name)]
            if missing:
                raise _odd(f"WORLD_SIZE={size} needs {', '.join(missing)} too")
            if not 0 < _number("MASTER_PORT", 0) < 65536:
                raise _odd(f"MASTER_PORT={os.environ['MASTER_PORT']} must be from 1 to 65535")
        return cls(rank, size, local_rank, local_size)


_MEETING = ("MASTER_ADDR", "MASTER_PORT")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise _odd(f"{name}={text!r} must be an integer")
    return int(text)


def _odd(what: str) -> UserError:
    return UserError(
        f"environment variable {what}; start the run with keel train --processes, torchrun or a "
        "launcher of launchers/, which set it, or unset RANK, WORLD_SIZE and related variables"
    )


def choose_device(preference: Literal["auto", "cuda", "cpu"], local_rank: int) -> torch.device:
    """The device of process `local_rank` of this node under `training.device`.

    It has that number, or 0 where CUDA_VISIBLE_DEVICES shows each process a single device, as
    SLURM's --gpus-per-task=1 does.

    Raises:
        UserError: CUDA is not available, or has fewer devices than processes.
    """
    available = torch.cuda.is_available()
    if preference == "cuda" and not available:
        raise UserError(
            "training.device: cuda is set, but torch finds no CUDA device (auto or cpu use the CPU)"
        )
    if preference == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"training.device: process {local_rank} of this node has no CUDA device of its own; "
            f"there are {count}: start at most {count} processes per node"
        )
    return torch.device("cuda", local_rank)


def gpu_name(device: torch.device) -> str | None:
    """Name of a CUDA device; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def set_cuda_numerics(*, deterministic: bool) -> None:
    """Set how torch's CUDA kernels compute, for this process.

    Sums within a bf16 product stay in fp32: torch's default lets cuBLAS add the parts of a split
    product, as of a weight gradient, in bf16.

    Args:
        deterministic: `training.deterministic`; operators without a repeatable kernel then raise.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.use_deterministic_algorithms(deterministic)
    # Would fill every new tensor; everything here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_threads(threads: int, local_world_size: int) -> int:
    """Set and return the CPU threads of this process; 0 shares the node's cores evenly."""
    count = threads or max(1, available_cores() // local_world_size)
    torch.set_num_threads(count)
    return count
