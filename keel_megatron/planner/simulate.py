"""Simulation of a pipeline step: every pass and every message of every stage.

A stage's program follows Megatron-core's schedule: it computes, posts a message to or from a
neighbour, and waits for a message. A message is transferred once both ends have posted it. 1F1B
waits for each message at once, so a sender blocks until its receiver is ready. Interleaving does so
only in the warm-up and cool-down; in between it overlaps messages with computation
(`overlap_p2p_comm`, as `model/language_model.py` sets it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from keel_megatron.planner.pipeline_schedule import Operation, stage_order, warmup_forwards


@dataclass(frozen=True)
class PipelineTimes:
    """Times of the parts of a step, in seconds.

    Chunks are in model order; chunk i is on stage i % pipeline.
    """

    pipeline: int
    forward: tuple[float, ...]
    """Forward pass of one micro-batch through each chunk."""
    backward: tuple[float, ...]
    """Backward pass, including recomputation."""
    link: tuple[float, ...]
    """Message of one micro-batch from stage i to its next one (the last one's next is stage 0)."""

    @property
    def virtual_pipeline(self) -> int:
        """Chunks per stage."""
        return len(self.forward) // self.pipeline


class Span(NamedTuple):
    """A pass with its start and end, in seconds from the start of the step."""

    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All passes of one step, per stage, with their times."""

    stages: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first forward pass to the end of the last backward pass."""
        return max(spans[-1].end for spans in self.stages)

    def busy_seconds(self, pipeline_rank: int) -> float:
        """Computation time of a stage, seconds."""
        return sum(end - start for _operation, start, end in self.stages[pipeline_rank])

    @property
    def bubble(self) -> float:
        """Idle time relative to the work of the busiest stage: (p - 1) / m if balanced."""
        busiest = max(self.busy_seconds(rank) for rank in range(len(self.stages)))
        return max(0.0, self.seconds / busiest - 1.0)  # a lone stage's sum rounds differently


@dataclass(frozen=True)
class MemoryTrace:
    """Memory of a stage, in bytes: a constant part, and activations per micro-batch."""

    constant: float
    """Parameters, gradients, optimizer, buffers, logits."""
    chunks: tuple[float, ...]
    """Activations of one micro-batch in each chunk of the stage."""


class _Message(NamedTuple):
    """The stream behind a chunk (forward) or its gradient (backward), of one micro-batch."""

    forward: bool
    cut: int
    """The boundary between chunk `cut` and chunk `cut + 1`, in model order."""
    micro_batch: int


class _Step(NamedTuple):
    """One step of a stage's program: compute, then post messages, then wait for messages."""

    compute: Operation | None
    offer: tuple[_Message, ...] = ()
    wait: tuple[_Message, ...] = ()


def simulate(times: PipelineTimes, micro_batches: int) -> Timeline:
    """Simulate one step.

    Raises:
        ValueError: interleaving with micro-batches that the number of stages does not divide.
    """
    programs = [
        _program(times.pipeline, times.virtual_pipeline, micro_batches, rank)
        for rank in range(times.pipeline)
    ]
    clocks = [0.0] * times.pipeline
    spans: list[list[Span]] = [[] for _ in programs]
    offered: dict[_Message, float] = {}
    arrived: dict[_Message, float] = {}
    waiting: dict[_Message, int] = {}
    ready = deque(range(times.pipeline))
    current: list[_Step | None] = [next(program, None) for program in programs]
    while ready:
        rank = ready.popleft()
        while (step := current[rank]) is not None:
            if step.compute is not None:
                start = clocks[rank]
                clocks[rank] = start + _duration(times, rank, step.compute)
                spans[rank].append(Span(step.compute, start, clocks[rank]))
            for message in step.offer:
                if message not in offered:
                    offered[message] = clocks[rank]
                    continue
                link = times.link[message.cut % times.pipeline]
                arrived[message] = max(offered.pop(message), clocks[rank]) + link
                if message in waiting:
                    ready.append(waiting.pop(message))
            missing = next((message for message in step.wait if message not in arrived), None)
            if missing is not None:
                waiting[missing] = rank
                current[rank] = _Step(None, (), step.wait)
                break
            for message in step.wait:
                clocks[rank] = max(clocks[rank], arrived[message])
            current[rank] = next(programs[rank], None)
    assert not waiting, "a schedule waits for a message that nobody sends"
    return Timeline(tuple(tuple(stage) for stage in spans))


def _duration(times: PipelineTimes, rank: int, operation: Operation) -> float:
    chunk = operation.chunk * times.pipeline + rank
    return times.forward[chunk] if operation.forward else times.backward[chunk]


class _Stage(NamedTuple):
    """A stage, with the messages that its passes receive and send."""

    pipeline: int
    chunks: int
    rank: int

    def takes(self, operation: Operation) -> tuple[_Message, ...]:
        """The message that a pass needs; none if it starts from data or from the loss."""
        cut = operation.chunk * self.pipeline + self.rank - operation.forward
        return self._message(operation, cut)

    def gives(self, operation: Operation) -> tuple[_Message, ...]:
        """The message that a pass sends, if any."""
        cut = operation.chunk * self.pipeline + self.rank - (not operation.forward)
        return self._message(operation, cut)

    def _message(self, operation: Operation, cut: int) -> tuple[_Message, ...]:
        inside = 0 <= cut < self.chunks - 1
        return (_Message(operation.forward, cut, operation.micro_batch),) if inside else ()


def _program(
    pipeline: int, virtual_pipeline: int, micro_batches: int, rank: int
) -> Iterator[_Step]:
    """A stage's program."""
    order = stage_order(pipeline, virtual_pipeline, micro_batches, rank)
    warmup = warmup_forwards(pipeline, virtual_pipeline, micro_batches, rank)
    stage = _Stage(pipeline, pipeline * virtual_pipeline, rank)
    if virtual_pipeline == 1:
        return _plain(order, warmup, stage)
    return _interleaved(order, warmup, stage)


def _plain(order: list[Operation], warmup: int, stage: _Stage) -> Iterator[_Step]:
    """1F1B: each pass sends its result and receives the next input before the next pass.

    In the warm-up and cool-down the two are sequential, otherwise simultaneous.
    """
    yield _exchange(None, stage.takes(order[0]))
    for number, operation in enumerate(order):
        gives = stage.gives(operation)
        takes = stage.takes(order[number + 1]) if number + 1 < len(order) else ()
        if warmup <= number < len(order) - warmup - 1:
            yield _exchange(operation, gives + takes)
        else:
            yield _exchange(operation, gives)
            yield _exchange(None, takes)


def _exchange(compute: Operation | None, messages: tuple[_Message, ...]) -> _Step:
    return _Step(compute, messages, messages)


def _interleaved(order: list[Operation], warmup: int, stage: _Stage) -> Iterator[_Step]:
    """Interleaved 1F1B: only the warm-up and the cool-down wait for their sends."""
    forwards = [operation for operation in order if operation.forward]
    backwards = [operation for operation in order if not operation.forward]
    steady = len(forwards) - warmup

    def takes(operations: list[Operation], number: int) -> tuple[_Message, ...]:
        return stage.takes(operations[number]) if number < len(operations) else ()

    yield _exchange(None, takes(forwards, 0))
    for number in range(warmup):
        operation = forwards[number]
        yield _exchange(operation, stage.gives(operation) + takes(forwards, number + 1))
    # The first gradient is requested before the first pass that overlaps with messages.
    yield _Step(None, takes(backwards, 0))
    sent: dict[bool, tuple[_Message, ...]] = {True: (), False: ()}
    for number in range(steady):
        for operations, at in ((forwards, warmup + number), (backwards, number)):
            operation = operations[at]
            yield _Step(None, (), stage.takes(operation))
            gives = stage.gives(operation)
            # A stage waits for a message once the next one in its direction is posted.
            yield _Step(operation, gives + takes(operations, at + 1), sent[operation.forward])
            sent[operation.forward] = gives
    for number in range(steady, len(backwards)):
        yield _Step(None, (), stage.takes(backwards[number]))
        operation = backwards[number]
        yield _exchange(operation, stage.gives(operation) + takes(backwards, number + 1))
