"""Process groups of a run, and each rank's position in the layout."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from keel_megatron import compat
from keel_megatron.compat import cpu
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.training import TrainingConfig
from keel_megatron.errors import UserError
from keel_megatron.runtime import cuda_environment
from keel_megatron.runtime.device import (
    Launch,
    choose_device,
    set_cuda_numerics,
    set_threads,
)
from keel_megatron.runtime.rendezvous import CollectiveTimeoutError, agree, meet, shared_store
from keel_megatron.runtime.seeds import seed_dropout

T = TypeVar("T")
_ABORT_SECONDS = 20.0


@dataclass(frozen=True)
class Runtime:
    """This process's device and position in the parallel layout."""

    device: torch.device
    launch: Launch
    threads: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    tensor_size: int
    pipeline_size: int
    data_size: int
    hosts: tuple[str, ...]
    """Every rank's host."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.launch.rank

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which reports."""
        return self.launch.rank == 0

    @property
    def host(self) -> str:
        """This rank's host."""
        return self.hosts[self.launch.rank]

    def named(self, rank: int) -> str:
        """A rank, with its host if there are several."""
        several = len(set(self.hosts)) > 1
        return f"rank {rank} on host {self.hosts[rank]}" if several else f"rank {rank}"

    def describe(self) -> str:
        """Description of this rank, for messages."""
        return (
            f"{self.named(self.rank)} (pipeline stage {self.pipeline_rank}, tensor rank "
            f"{self.tensor_rank}, replica {self.data_rank})"
        )

    def on_stage(self, stage: int) -> int:
        """Global rank of this tensor rank and replica on another pipeline stage."""
        per_stage = self.tensor_size * self.data_size
        return self.rank + (stage - self.pipeline_rank) * per_stage

    def barrier(self) -> None:
        """Wait for every rank of the run."""
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """The largest value of any rank; the same answer on all."""
        vote = torch.tensor(value, device=self.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return int(vote)

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on global rank 0; empty elsewhere."""
        values: list[Any] = [None] * self.launch.world_size
        dist.gather_object(value, values if self.is_main else None, dst=0)
        return values if self.is_main else []

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on global rank 0 only, and return its result on every rank.

        Raises:
            UserError: the error of rank 0, on every rank; marked as reported on the others.
        """
        answer: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                answer[0] = make()
            except UserError as error:
                failure = error
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise UserError(answer[1], reported=True)
        return answer[0]


@contextmanager
def start(
    parallel: ParallelConfig,
    training: TrainingConfig,
    launch: Launch | None = None,
    identical: Mapping[str, Any] | None = None,
) -> Iterator[Runtime]:
    """Set up this process's device and process groups, and destroy them at the end.

    Args:
        parallel: the layout.
        training: the device, its threads and the seed.
        launch: rank and world size; None: from torchrun's variables.
        identical: what must be identical on all ranks, by name; compared before groups are created.

    Raises:
        CollectiveTimeoutError: a rank waited longer than `parallel.timeout_seconds`; names the
            rank that waited.
        UserError: the device is not available, the ranks differ, or this process has process
            groups.
    """
    if dist.is_initialized():
        raise UserError(
            "this process already holds a model or trains a run; close the model first, or use "
            "another process"
        )
    launch = launch or Launch.from_environment()
    cuda_environment.prepare(parallel, training)
    device = choose_device(training.device, launch.local_rank)
    compat.install()
    if device.type == "cpu":
        cpu.install()
    else:
        torch.cuda.set_device(device)
        set_cuda_numerics(deterministic=training.deterministic)
    threads = set_threads(training.threads, launch.local_world_size)
    _init_process_group(launch, device, parallel.timeout_seconds, identical or {})
    try:
        runtime = model_parallel(parallel, launch, device, threads)
        seed_dropout(training.seed, runtime.pipeline_rank, runtime.data_rank)
        with _named_timeouts(runtime, parallel.timeout_seconds):
            yield runtime
    except BaseException as error:
        _abandon(device, error)
        raise
    _take_down()


def _init_process_group(
    launch: Launch, device: torch.device, timeout_seconds: float, identical: Mapping[str, Any]
) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.world_size == 1:
        store: Store = HashStore()
    else:
        shared = shared_store(timeout_seconds)
        store = meet(shared, launch.rank, launch.world_size, timeout_seconds)
        if identical:
            agree(store, launch.rank, launch.world_size, socket.gethostname(), identical)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )


def model_parallel(
    parallel: ParallelConfig, launch: Launch, device: torch.device, threads: int
) -> Runtime:
    """Make Megatron-core's process groups of the layout; this rank's place in them."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        distributed_timeout_minutes=parallel.timeout_seconds / 60,
        create_gloo_process_groups=False,
    )
    hosts = [socket.gethostname()] * launch.world_size
    dist.all_gather_object(hosts, hosts[launch.rank])
    return Runtime(
        device=device,
        launch=launch,
        threads=threads,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_size=parallel.pipeline,
        data_size=parallel_state.get_data_parallel_world_size(),
        hosts=tuple(hosts),
    )


@contextmanager
def _named_timeouts(runtime: Runtime, timeout_seconds: float) -> Iterator[None]:
    """Name the waiting rank when a collective times out."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            raise CollectiveTimeoutError(
                f"{runtime.describe()} waited more than parallel.timeout_seconds = "
                f"{timeout_seconds:g} for another rank: {error}"
            ) from error
        if "connection closed" in text or "connection reset" in text:
            raise CollectiveTimeoutError(
                f"{runtime.describe()} lost the connection to another rank: {error}"
            ) from error
        raise


def _abandon(device: torch.device, error: BaseException) -> None:
    """Take down after an error; on CUDA without waiting for messages under way.

    Destroying an NCCL communicator waits for its messages, which the other ranks will not answer:
    this rank would hang, and they would until their watchdog ends them. Aborting ends the messages.
    A `UserError` is raised by all ranks together, behind a message that must still be delivered.
    """
    if device.type != "cuda" or isinstance(error, UserError):
        return _take_down()
    # It might hang too, and the error is yet to be reported.
    aborting = threading.Thread(target=_abort, name="abort", daemon=True)
    aborting.start()
    aborting.join(_ABORT_SECONDS)
    return None


def _abort() -> None:
    with suppress(Exception):  # the error that led here is the one to report
        dist.distributed_c10d._abort_process_group()


def _take_down() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
