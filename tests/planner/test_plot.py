"""The picture of a step: what is drawn is what was simulated."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from keel_megatron.planner import plot
from keel_megatron.planner.simulate import MemoryTrace, PipelineTimes, Timeline, simulate

GB = 1e9


def step(pipeline: int, virtual: int, micro_batches: int) -> Timeline:
    count = pipeline * virtual
    return simulate(
        PipelineTimes(pipeline, (0.02,) * count, (0.04,) * count, (0.001,) * pipeline),
        micro_batches,
    )


def traces(timeline: Timeline, virtual: int) -> list[MemoryTrace]:
    return [MemoryTrace(10 * GB, (2 * GB / virtual,) * virtual) for _ in timeline.stages]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"), [(1, 1, 4), (4, 1, 8), (4, 2, 64), (64, 1, 128)]
)
def test_a_step_becomes_a_picture(pipeline: int, virtual: int, micro_batches: int) -> None:
    timeline = step(pipeline, virtual, micro_batches)
    content = plot.plot_schedule(
        timeline, traces(timeline, virtual), title="run", facts="facts", memory_limit=20 * GB
    )
    picture = imread(BytesIO(content))[..., :3]
    assert picture.shape[1] > 1500
    # Of what is drawn in the schedule some is blue (forward), more is orange (twice as long).
    forward = (picture[..., 2] - picture[..., 0] > 0.3).sum()
    backward = (picture[..., 0] - picture[..., 2] > 0.3).sum()
    assert 0 < forward < backward


def test_every_pass_of_a_short_step_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []

    def keep(figure: Figure, _out: Any, **_kwargs: Any) -> None:
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    timeline = step(4, 1, 6)
    plot.plot_schedule(timeline, traces(timeline, 1), title="", facts="")
    schedule, memory = drawn[0].axes
    bars = [path for row in schedule.collections for path in row.get_paths()]
    assert len(bars) == 4 * 2 * 6
    last = max(path.get_extents().x1 for path in bars)
    assert last == pytest.approx(timeline.seconds * 1e3)  # in ms, as it is short
    # Stage 0 holds four micro-batches of 2 GB beside its 10 GB, stage 3 one.
    highest = [max(line.get_ydata()) for line in memory.lines]
    assert highest == pytest.approx([18.0, 16.0, 14.0, 12.0])


def test_a_long_step_is_its_beginning_and_its_end() -> None:
    timeline = step(4, 1, 200)
    first, last = plot._windows(timeline)
    assert first.start == 0.0
    assert last.end == timeline.seconds
    assert first.end < last.start
    backward = next(span for span in timeline.stages[0] if not span.operation.forward)
    assert first.end > backward.end
    assert [w.end for w in plot._windows(step(4, 1, 6))] == [step(4, 1, 6).seconds]
