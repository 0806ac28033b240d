"""Start real ranks on gloo and bring back what they return.

A test hands `run_ranks` a module-level function of the test's module and its arguments; every rank
runs it in a process of its own, with torchrun's variables set, and returns something picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

TIMEOUT_SECONDS = 300

_meeting: tuple[Any, Any] | None = None
"""A rank's barrier with the others, and the port that they agree on there."""


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet() -> None:
    """Within a rank: wait for the others, and agree on another port.

    To be called before process groups are started again in the same processes. The store of the
    last time may live on in rank 0, kept by garbage, and would answer with what was said then.
    """
    assert _meeting is not None
    barrier, port = _meeting
    barrier.wait(timeout=TIMEOUT_SECONDS)
    if os.environ["RANK"] == "0":
        port.value = free_port()
    barrier.wait(timeout=TIMEOUT_SECONDS)
    os.environ["MASTER_PORT"] = str(port.value)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Any]:
    """What `function(*args)` returned on each of `world_size` ranks, in rank order.

    Raises:
        AssertionError: a rank failed (with its traceback) or did not answer in time.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    meeting = (context.Barrier(world_size), context.Value("i", port))
    processes = [
        context.Process(
            target=_rank,
            args=(rank, world_size, port, meeting, results, function, args),
            daemon=False,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, value, error = results.get(timeout=timeout_seconds)
            assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
            answers[rank] = pickle.loads(value)
    except Empty:
        missing = sorted(set(range(world_size)) - set(answers))
        raise AssertionError(f"ranks {missing} gave no answer in {timeout_seconds} s") from None
    finally:
        for process in processes:
            process.join(timeout=10 if len(answers) == world_size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [answers[rank] for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    port: int,
    meeting: tuple[Any, Any],
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    global _meeting
    _meeting = meeting
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        # Pickled here: the queue itself would share tensors' memory with a process that ends.
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
