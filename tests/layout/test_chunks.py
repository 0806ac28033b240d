"""Blocks spread over stages: every block once, in order, evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.layout.chunks import Chunk, Layout, from_counts


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_nothing_is_dropped(pipeline: int, virtual: int, data: st.DataObject) -> None:
    chunks = pipeline * virtual
    counts = data.draw(st.lists(st.integers(1, 20), min_size=chunks, max_size=chunks))
    layout, blocks = from_counts(counts, pipeline), sum(counts)
    layout.check(blocks)
    covered = [
        block
        for chunk in layout.chunks
        for block in range(chunk.first_block, chunk.first_block + chunk.blocks)
    ]
    assert covered == list(range(blocks))
    assert layout.virtual_pipeline == virtual
    assert sum(row.count("decoder") for row in layout.to_megatron()) == blocks


def test_chunks_are_dealt_to_stages_in_turn() -> None:
    layout = from_counts([1, 2, 3, 4], pipeline=2)
    assert [chunk.blocks for chunk in layout.stage(0)] == [1, 3]
    assert [chunk.first_block for chunk in layout.stage(1)] == [1, 6]
    assert layout.to_megatron()[0] == ["embedding", "decoder"]
    assert layout.to_megatron()[3] == ["decoder"] * 4 + ["loss"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (from_counts([3, 4], 2), "hold 7 blocks, the model has 8"),
        (Layout(2, (Chunk(0, 4, embedding=True), Chunk(5, 3, head=True))), "not at 4"),
        (Layout(2, (Chunk(0, 4, embedding=True), Chunk(4, 4))), "head"),
        (Layout(2, (Chunk(0, 8, embedding=True, head=True),)), "evenly"),
    ],
)
def test_a_layout_that_loses_something_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(8)
