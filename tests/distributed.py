"""Start real ranks on gloo and bring back what they return.

A test hands `run_ranks` a module-level function of the test's module and its arguments; every rank
runs it in a process of its own, with torchrun's variables set, and returns something picklable. As
with torchrun one store in the parent serves all starts of process groups, one after the other.

The processes are forked from one that has imported torch and Megatron-core (tests/rank_imports.py)
and done nothing else: otherwise the imports would be most of what many a rank does. CUDA does not
survive a fork, so with it every process starts from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
from torch.distributed import TCPStore

TIMEOUT_SECONDS = 300
METHOD = "spawn" if torch.cuda.is_available() else "forkserver"
CONTEXT: Any = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    CONTEXT.set_forkserver_preload(["tests.rank_imports"])


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
    # Pickled here and there: multiprocessing itself would share tensors' memory, by a file
    # descriptor each, with a process that ends.
    call = pickle.dumps((function, args))
    results: Any = CONTEXT.Queue()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        CONTEXT.Process(
            target=_rank,
            args=(_environment(rank, world_size, store.port), results, call),
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


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """This process's, with what torchrun would add."""
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(environment: dict[str, str], results: Any, call: bytes) -> None:
    os.environ.clear()  # the process that this was forked from has an older one
    os.environ.update(environment)
    rank = int(environment["RANK"])
    try:
        function, args = pickle.loads(call)
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
