"""The machines that computed something: recorded in its folder, so that results can name them.

A folder's `machines.json` lists the kinds of nodes of all its starts, each once, in the order of
their first use. Null stands for a start before there was a record. Imports no torch.
"""

from __future__ import annotations

import json
import platform
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import parse_json, read_small
from keel_megatron.config.terminal import printable
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.files import write_whole

FILE = "machines.json"
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Place:
    """Where one process computes."""

    host: str
    cpu: str
    cores: int
    """CPU cores available to it."""
    gpu: str | None
    """Name of its GPU; None: it computes on the CPU."""


@dataclass(frozen=True)
class Machine:
    """A kind of node, and how many of them a process group has."""

    cpu: str
    cores: int
    """CPU cores available on one node."""
    nodes: int = 1
    gpu: str | None = None
    gpus: int = 0
    """GPUs in use, of all nodes together."""

    def __str__(self) -> str:
        """Such as "16 x NVIDIA H200 on 2 nodes (AMD EPYC, 96 cores)"."""
        host = f"{self.cpu}, {self.cores} core{'s' if self.cores != 1 else ''}"
        if self.gpu is None:
            return host if self.nodes == 1 else f"{self.nodes} nodes with {host}"
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.gpus} x {self.gpu}{nodes} ({host})"


def this_place(gpu: str | None = None) -> Place:
    """Where this process computes.

    Args:
        gpu: name of its GPU.
    """
    return Place(socket.gethostname(), cpu_name(), available_cores(), gpu)


def this_machine() -> Machine:
    """This node, without its GPUs."""
    return machines([this_place()])[0]


def machines(places: Iterable[Place]) -> list[Machine]:
    """The kinds of nodes of a process group.

    Args:
        places: of all processes, in rank order.
    """
    processes: Counter[tuple[str, int, str | None]] = Counter()
    hosts: dict[tuple[str, int, str | None], set[str]] = {}
    for one in places:
        kind = (one.cpu, one.cores, one.gpu)
        processes[kind] += 1
        hosts.setdefault(kind, set()).add(one.host)
    return [
        Machine(cpu, cores, len(hosts[cpu, cores, gpu]), gpu, n if gpu is not None else 0)
        for (cpu, cores, gpu), n in processes.items()
    ]


def record(folder: Path, found: Sequence[Machine], earlier: Sequence[Machine | None] = ()) -> None:
    """Write a folder's record.

    Args:
        folder: what the machines compute.
        found: the machines of this start.
        earlier: those of earlier starts, of whose work something remains.

    Raises:
        OSError: the file cannot be written.
    """
    both = dict.fromkeys([*earlier, *found])
    lines = [None if one is None else asdict(one) for one in both]
    write_whole(folder / FILE, json.dumps(lines, indent=1) + "\n")


def recorded(folder: Path) -> list[Machine | None]:
    """The machines of a folder's record; [None] if it has none that can be read."""
    with suppress(OSError, ValueError, TypeError):
        found = parse_json(read_small(folder / FILE))
        if isinstance(found, list) and found:
            return [None if one is None else _machine(one) for one in found]
    return [None]


def named(found: Sequence[Machine | None]) -> str:
    """Machines in words; "not recorded" for those that are not known."""
    return " and ".join(NOT_RECORDED if one is None else str(one) for one in found)


def cpu_name() -> str:
    """Name of the CPU."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _machine(values: Any) -> Machine:
    """A machine from a file that a stranger may have written.

    Raises:
        ValueError: it is none.
        TypeError: it is none.
    """
    one = Machine(**values)
    texts = [one.cpu, *([] if one.gpu is None else [one.gpu])]
    numbers = (one.cores, one.nodes, one.gpus)
    if not all(type(text) is str for text in texts) or not all(type(n) is int for n in numbers):
        raise ValueError("not a machine")
    gpu = None if one.gpu is None else printable(one.gpu, one_line=True)
    return Machine(printable(one.cpu, one_line=True), one.cores, one.nodes, gpu, one.gpus)
