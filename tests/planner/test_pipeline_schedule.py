"""The order of passes and messages, against Megatron-core's own schedules run with recorders."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig

from keel_megatron.compat import cpu
from keel_megatron.layout.memory import in_flight
from keel_megatron.planner.pipeline_schedule import Operation, stage_order, warmup_forwards
from keel_megatron.planner.simulate import _Message, _program

CASES = [(2, 1, 1), (4, 1, 2), (4, 1, 4), (4, 1, 9), (2, 2, 2), (2, 2, 6), (4, 2, 4), (4, 3, 8)]
# What a stage offers and waits for, by direction, after each pass (and before the first).
Gap = tuple[dict[str, int], dict[str, int]]


class Group:
    """A pipeline group as seen from one rank, without processes."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class Recorder(P2PCommunicator):
    """Writes down the passes, messages and waits of Megatron-core's schedule."""

    def __init__(self, group: Group, config: TransformerConfig) -> None:
        self.pp_group, self.config = group, config
        self.next_rank = self.prev_rank = None
        self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
        self.passes: list[Operation] = []
        self.gaps: list[tuple[Counter[str], Counter[str]]] = [(Counter(), Counter())]
        self.backwards: Counter[int] = Counter()

    def compute(self, operation: Operation) -> None:
        self.passes.append(operation)
        self.gaps.append((Counter(), Counter()))

    def _communicate(self, *, tensor_send_next: Any, tensor_send_prev: Any, **kwargs: Any) -> Any:
        offers = {
            "send_next": tensor_send_next is not None,
            "send_prev": tensor_send_prev is not None,
            "recv_prev": kwargs["recv_prev"],
            "recv_next": kwargs["recv_next"],
        }
        made = [direction for direction, offered in offers.items() if offered]
        self.gaps[-1][0].update(made)
        handles = {direction: self._handle(direction) for direction in made}
        if kwargs.get("wait_on_reqs", True):
            self.gaps[-1][1].update(made)
        received = [torch.zeros(1) if offers[name] else None for name in ("recv_prev", "recv_next")]
        return *received, handles

    def _handle(self, direction: str) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: self.gaps[-1][1].update([direction]))


class Chunk(torch.nn.Module):
    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        self.config, self.number, self.model_type = config, number, None


def megatron_config(pipeline: int, virtual: int) -> TransformerConfig:
    """As model/language_model.py sets it, where it matters to a schedule."""
    interleaved: dict[str, Any] = {}
    if virtual > 1:
        interleaved = {
            "virtual_pipeline_model_parallel_size": virtual,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    return TransformerConfig(
        num_layers=pipeline * virtual,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=False,
        **interleaved,
    )


def recorded(
    monkeypatch: pytest.MonkeyPatch, pipeline: int, virtual: int, micro_batches: int, rank: int
) -> Recorder:
    """Megatron-core's schedule, run on one rank with passes and messages that only get noted."""
    cpu.install()
    config = megatron_config(pipeline, virtual)
    group = Group(pipeline, rank)
    recorder = Recorder(group, config)
    models = [Chunk(config, number) for number in range(virtual)]

    def forward(_step: Any, _data: Any, model: Any, *_args: Any, **kwargs: Any) -> Any:
        recorder.compute(Operation(True, model.number, kwargs["current_microbatch"]))
        output = torch.zeros(1)
        output.chunk = model.number  # type: ignore[attr-defined]
        return (output if virtual > 1 else [output]), torch.zeros([], dtype=torch.int)

    def backward(_input: Any, output: Any, *_args: Any) -> torch.Tensor:
        # Outputs leave a chunk in the order in which they came.
        chunk = (output if virtual > 1 else output[0]).chunk
        recorder.compute(Operation(False, chunk, recorder.backwards[chunk]))
        recorder.backwards[chunk] += 1
        return torch.zeros(1)

    # Megatron-core's own answer without torch.distributed is that every stage is the only one.
    monkeypatch.setattr(schedules, "is_pp_first_stage", lambda _group: rank == 0)
    monkeypatch.setattr(schedules, "is_pp_last_stage", lambda _group: rank == pipeline - 1)
    monkeypatch.setattr(schedules, "forward_step", forward)
    monkeypatch.setattr(schedules, "backward_step", backward)
    one = Group(1, 0)
    groups = SimpleNamespace(pp=group, tp=one, cp=one, embd=None, pos_embd=None, dp_cp=one)
    run = (
        schedules.forward_backward_pipelining_with_interleaving
        if virtual > 1
        else schedules.forward_backward_pipelining_without_interleaving
    )
    run(
        forward_step_func=None,
        data_iterator=[None] * virtual,
        model=models,
        num_microbatches=micro_batches,
        seq_length=4,
        micro_batch_size=1,
        p2p_communicator=recorder,
        pg_collection=groups,
    )
    return recorder


def programmed(pipeline: int, virtual: int, micro_batches: int, rank: int) -> tuple[list[Any], Any]:
    """The simulator's program in the recorder's words."""

    def direction(message: _Message) -> str:
        ours = message.cut % pipeline == rank  # the cut is behind one of this stage's chunks
        if message.forward:
            return "send_next" if ours else "recv_prev"
        return "recv_next" if ours else "send_prev"

    passes: list[Operation] = []
    gaps: list[tuple[Counter[str], Counter[str]]] = [(Counter(), Counter())]
    waited: set[_Message] = set()
    for compute, offer, wait in _program(pipeline, virtual, micro_batches, rank):
        if compute is not None:
            passes.append(compute)
            gaps.append((Counter(), Counter()))
        gaps[-1][0].update(direction(message) for message in offer)
        gaps[-1][1].update(direction(message) for message in wait if message not in waited)
        waited.update(wait)
    return passes, gaps


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), CASES)
def test_passes_and_messages_are_megatrons(
    monkeypatch: pytest.MonkeyPatch, pipeline: int, virtual: int, micro_batches: int
) -> None:
    for rank in range(pipeline):
        golden = recorded(monkeypatch, pipeline, virtual, micro_batches, rank)
        passes, gaps = programmed(pipeline, virtual, micro_batches, rank)
        assert passes == golden.passes
        assert passes == stage_order(pipeline, virtual, micro_batches, rank)
        # After its last pass a stage may still wait for a message to leave.
        assert gaps[:-1] == golden.gaps[:-1]
        assert gaps[-1][0] == golden.gaps[-1][0]


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), CASES)
def test_warmup_is_megatrons(pipeline: int, virtual: int, micro_batches: int) -> None:
    for rank in range(pipeline):
        place = SimpleNamespace(
            pp_group=Group(pipeline, rank),
            virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        )
        counts = schedules.get_pp_rank_microbatches(
            micro_batches, virtual, pipeline, p2p_communicator=place
        )
        assert warmup_forwards(pipeline, virtual, micro_batches, rank) == counts[2]


def test_an_order_by_hand() -> None:
    """The third of four stages runs one micro-batch ahead."""
    assert [name(operation) for operation in stage_order(4, 1, 5, 2)] == [
        *("F0", "F1", "B0", "F2", "B1", "F3", "B2", "F4", "B3", "B4")
    ]


def name(operation: Operation) -> str:
    return f"{'F' if operation.forward else 'B'}{operation.micro_batch}"


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), CASES)
def test_the_memory_model_counts_what_the_order_keeps(
    pipeline: int, virtual: int, micro_batches: int
) -> None:
    """Two ways to what is in flight: following the order, and memory.py's closed form."""
    for rank in range(pipeline):
        kept = [0] * virtual
        moments = set()
        for forward, chunk, _micro_batch in stage_order(pipeline, virtual, micro_batches, rank):
            kept[chunk] += 1 if forward else -1
            moments.add(tuple(kept))
        assert kept == [0] * virtual
        fullest = in_flight(pipeline, virtual, rank, micro_batches)
        assert set(fullest) <= moments
        for weights in [(1,) * virtual, (1, 5, 2, 7)[:virtual]]:
            assert max(weighed(one, weights) for one in fullest) == max(
                weighed(one, weights) for one in moments
            )


def weighed(counts: tuple[int, ...], weights: tuple[int, ...]) -> int:
    return sum(count * weight for count, weight in zip(counts, weights, strict=True))


def test_interleaving_refuses_a_remainder() -> None:
    with pytest.raises(ValueError, match="7 micro-batches are not a multiple of 4"):
        stage_order(4, 2, 7, 0)
