"""Start several processes of a command on this machine, as `torchrun --standalone` does."""

from __future__ import annotations

import os
import sys
import uuid


def launch(processes: int, arguments: list[str]) -> int:
    """Run `python -m keel_megatron ARGUMENTS` in a torchrun group of this machine.

    torchrun itself would do, but follows an error message of ours with a traceback of its own.

    Returns:
        The exit code: 0, that of the first process that failed, or 128 + the signal.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Each process sets its own threads (training.threads); this is what it starts with.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    command = ["-m", "keel_megatron", *arguments]
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        _rank, failure = error.get_first_failure()
        code: int = failure.exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
