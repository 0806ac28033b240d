"""`keel plan --trace`: one rank of every distinct stage, in processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.layout.memory import in_flight
from keel_megatron.layout.stages import Stage
from keel_megatron.planner.plan import Plan
from keel_megatron.runtime.cores import available_cores

if TYPE_CHECKING:  # torch comes with it: a plan without a trace needs none
    from keel_megatron.planner.trace.result import RankTrace

LIMITS = (
    "A trace runs the program on fake CUDA tensors: no values, no times, no streams, no "
    "NCCL. Memory inside kernels is declared or left out (cuBLAS, NCCL, the driver: reserved_gb), "
    "and what a kernel itself refuses is not seen."
)


@dataclass(frozen=True)
class Trace:
    """The traces of a plan's stages."""

    ranks: tuple[RankTrace, ...]
    """One a distinct stage, in order."""
    like: tuple[int, ...]
    """For every stage the traced one that it equals."""

    @property
    def worst(self) -> RankTrace:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.peak)

    def as_object(self) -> dict[str, Any]:
        """For a program."""
        return {
            "limits": LIMITS,
            "stage_like": list(self.like),
            "ranks": [rank.as_object() for rank in self.ranks],
        }


def check_traceable(config: RunConfig, device: str) -> None:
    """See that a trace can stand for the run.

    Raises:
        UserError: it asks for what is not traced.
    """
    kernels = config.kernels
    wrong = None
    if device == "cpu":
        wrong = "traces CUDA: --gpu must be a GPU, not cpu"
    elif config.training.engine != "megatron":
        wrong = f"traces the Megatron engine, not training.engine: {config.training.engine}"
    elif kernels.compile:
        wrong = "does not trace what torch compiles: kernels.compile must be false"
    elif kernels.cuda_graphs:
        wrong = "does not trace CUDA graphs: kernels.cuda_graphs must be false"
    elif kernels.fp8 != "none":
        wrong = "does not trace fp8: kernels.fp8 must be none"
    elif kernels.backend in ("transformer_engine", "apex"):
        wrong = f"traces torch's modules: kernels.backend must be auto, not {kernels.backend}"
    if wrong is not None:
        raise UserError(f"--trace {wrong}")


def distinct_stages(plan: Plan) -> tuple[int, ...]:
    """For every stage the first one that holds the same and as many micro-batches."""
    first: dict[Any, int] = {}
    return tuple(first.setdefault(_kind(plan, s), s.number) for s in plan.partition.stages)


def _kind(plan: Plan, stage: Stage) -> Any:
    parallel = plan.config.parallel
    held = in_flight(parallel.pipeline, parallel.virtual_pipeline, stage.number, plan.micro_batches)
    counts = tuple(chunk.blocks for chunk in stage.chunks)
    # A stage that is neither the first nor the last sends and receives both ways.
    ends = (stage.number == 0, stage.number == parallel.pipeline - 1)
    return counts, stage.recomputed, stage.embedding, stage.head, ends, held


def trace_plan(plan: Plan, micro_batches: int | None = None) -> Trace:
    """Trace one rank of every distinct stage, as many at a time as there are cores.

    Args:
        plan: what is traced.
        micro_batches: of the traced step; None = 2 x pipeline stages.

    Raises:
        UserError: the run asks for what is not traced, or a package is missing.
    """
    check_traceable(plan.config, plan.device.name)
    try:
        import triton  # noqa: F401 - the launches of its kernels are counted

        from keel_megatron.planner.trace.rank import Request, trace_rank
    except ImportError as error:
        raise UserError(f"--trace needs torch, megatron-core and triton here: {error}") from error
    like = distinct_stages(plan)
    requests = [
        Request(plan.config, plan.gpus, plan.device, stage, micro_batches=micro_batches)
        for stage in sorted(set(like))
    ]
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(available_cores(), len(requests)))
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with ProcessPoolExecutor(
        workers,
        mp_context=context,
        # Ctrl-C ends the processes at once; as an exception it would be the result of their task.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL),
        max_tasks_per_child=1,  # one that has traced is of no further use
    ) as pool:
        try:
            ranks = tuple(pool.map(trace_rank, requests))
        except BrokenProcessPool:
            raise UserError(
                "--trace: a tracing process was killed, most likely for lack of memory; trace "
                "fewer stages at a time by running with fewer cores (taskset)"
            ) from None
    return Trace(ranks, like)
