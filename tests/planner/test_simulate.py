"""The simulated step against closed formulas, hand-made schedules and bounds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.planner.simulate import PipelineTimes, simulate
from tests.calls import calls_of

SECONDS = st.floats(0.01, 10.0)


def even(
    pipeline: int, virtual: int, forward: float = 1.0, backward: float = 2.0, link: float = 0.0
) -> PipelineTimes:
    """Stages of equal work: forward and backward are a whole stage's."""
    chunks = pipeline * virtual
    return PipelineTimes(
        pipeline, (forward / virtual,) * chunks, (backward / virtual,) * chunks, (link,) * pipeline
    )


@given(st.integers(1, 12), st.integers(1, 30), SECONDS, SECONDS)
@settings(deadline=None)
def test_even_1f1b_is_the_closed_formula(
    pipeline: int, micro_batches: int, forward: float, backward: float
) -> None:
    """(m + p - 1) (f + b): a bubble of (p - 1) / m, also where m < p."""
    timeline = simulate(even(pipeline, 1, forward, backward), micro_batches)
    assert timeline.seconds == pytest.approx(
        (micro_batches + pipeline - 1) * (forward + backward), rel=1e-12
    )
    assert timeline.bubble == pytest.approx((pipeline - 1) / micro_batches, abs=1e-9)


@given(st.integers(2, 6), st.integers(2, 5), st.integers(1, 4), SECONDS, SECONDS)
@settings(deadline=None)
def test_even_interleaving_is_the_closed_formula(
    pipeline: int, virtual: int, groups: int, forward: float, backward: float
) -> None:
    """(m + (p - 1) / v) (f + b): a bubble of (p - 1) / (v m)."""
    micro_batches = groups * pipeline
    timeline = simulate(even(pipeline, virtual, forward, backward), micro_batches)
    expected = (micro_batches + (pipeline - 1) / virtual) * (forward + backward)
    assert timeline.seconds == pytest.approx(expected, rel=1e-12)
    assert timeline.bubble == pytest.approx((pipeline - 1) / (virtual * micro_batches), abs=1e-9)


def test_one_micro_batch_passes_every_chunk_and_every_cut_twice() -> None:
    times = PipelineTimes(3, (1.0, 2.0, 4.0), (3.0, 5.0, 7.0), (0.25, 0.5, 99.0))
    assert simulate(times, 1).seconds == 22.0 + 2 * 0.75


def test_a_message_time_by_hand() -> None:
    """Two stages, f = 1, b = 2, a message 0.5, two micro-batches.

    Stage 0: F0 0-1, its send until 1.5, F1 1.5-2.5. Stage 1: F0 1.5-2.5, B0 2.5-4.5; the exchange
    of F1 and B0's gradient takes until 5. Stage 0: B0 5-7, then waits. Stage 1: F1 5-6, B1 6-8.
    Gradient until 8.5; stage 0: B1 8.5-10.5.
    """
    timeline = simulate(even(2, 1, link=0.5), 2)
    assert [(span.start, span.end) for span in timeline.stages[0]] == [
        (0.0, 1.0),
        (1.5, 2.5),
        (5.0, 7.0),
        (8.5, 10.5),
    ]
    assert [(span.start, span.end) for span in timeline.stages[1]] == [
        (1.5, 2.5),
        (2.5, 4.5),
        (5.0, 6.0),
        (6.0, 8.0),
    ]


def test_a_sender_waits_for_its_receiver() -> None:
    """Stage 1 is slow: stage 0 may not run ahead, its second send waits until F0 is done there."""
    times = PipelineTimes(3, (1.0, 10.0, 1.0), (1.0, 1.0, 1.0), (0.0,) * 3)
    starts = [span.start for span in simulate(times, 3).stages[0]]
    assert starts[:3] == [0.0, 1.0, 11.0]


def test_interleaving_computes_while_messages_pass() -> None:
    """As long as a message is shorter than a chunk's pass, the steady state does not feel it."""
    steps = [simulate(even(2, 2, link=0.1), count).seconds for count in (20, 40)]
    assert steps[1] - steps[0] == pytest.approx(20 * 3.0, rel=1e-3)
    plain = [simulate(even(2, 1, link=0.1), count).seconds for count in (20, 40)]
    assert plain[1] - plain[0] == pytest.approx(20 * 3.1, rel=1e-3)  # one exchange a pair


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[PipelineTimes, int]:
    pipeline, virtual = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    virtual = virtual if pipeline > 1 else 1
    count = pipeline * virtual
    lists = [draw(st.lists(SECONDS, min_size=n, max_size=n)) for n in (count, count, pipeline)]
    groups = draw(st.integers(1, 3))
    return PipelineTimes(pipeline, *map(tuple, lists)), groups * pipeline


def stage_seconds(times: PipelineTimes, rank: int) -> float:
    """Computation of one micro-batch on one stage."""
    chunks = slice(rank, None, times.pipeline)
    return sum(times.forward[chunks]) + sum(times.backward[chunks])


@given(pipelines())
@settings(deadline=None)
def test_any_pipeline_keeps_the_rules(case: tuple[PipelineTimes, int]) -> None:
    times, micro_batches = case
    timeline = simulate(times, micro_batches)
    ends: dict[tuple[bool, int, int], tuple[float, float]] = {}
    for rank, spans in enumerate(timeline.stages):
        assert len(spans) == 2 * times.virtual_pipeline * micro_batches
        assert timeline.busy_seconds(rank) == pytest.approx(
            micro_batches * stage_seconds(times, rank)
        )
        for before, after in itertools.pairwise(spans):
            assert after.start >= before.end
        for (forward, chunk, micro_batch), start, end in spans:
            ends[forward, chunk * times.pipeline + rank, micro_batch] = start, end
    last = len(times.forward) - 1
    for (forward, chunk, micro_batch), (start, _end) in ends.items():
        # Each pass starts once the one it depends on is done and its message is here.
        if forward and chunk > 0:
            needed = (
                ends[True, chunk - 1, micro_batch][1] + times.link[(chunk - 1) % times.pipeline]
            )
        elif not forward and chunk < last:
            needed = ends[False, chunk + 1, micro_batch][1] + times.link[chunk % times.pipeline]
        elif not forward:
            needed = ends[True, chunk, micro_batch][1]
        else:
            needed = 0.0
        assert start >= needed - 1e-9
    busiest = max(stage_seconds(times, rank) for rank in range(times.pipeline))
    everything = sum(times.forward) + sum(times.backward) + 6 * last * max(times.link)
    assert micro_batches * busiest <= timeline.seconds * (1 + 1e-9)
    assert timeline.seconds <= micro_batches * everything * (1 + 1e-9)


def test_a_thousand_micro_batches_on_64_stages_take_few_calls() -> None:
    timeline, calls = calls_of(lambda: simulate(even(64, 1, link=0.01), 1024))
    assert len(timeline.stages) == 64
    assert calls < 10_000_000  # seconds of Python
