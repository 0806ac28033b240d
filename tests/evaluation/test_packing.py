"""Rows in sequences: each once, whole, and beside others only where it may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.evaluation.packing import Packing
from keel_megatron.evaluation.rows import Row

LENGTH = 12


SHAPES = [(size, scored) for size in range(2, LENGTH + 2) for scored in range(1, size)]
"""Tokens of a row, and how many are scored."""


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=30), st.booleans())
def test_every_row_is_there_once(shapes: list[tuple[int, int]], together: bool) -> None:
    starts = [1 + 100 * number for number in range(len(shapes))]
    given_rows = [
        Row(tuple(range(start, start + size)), scored)
        for start, (size, scored) in zip(starts, shapes, strict=True)
    ]
    packing = Packing(given_rows, LENGTH, 0, together=together)
    packed = packing.sequences(0, len(packing) + 1)
    seen: dict[int, Row] = {}
    for tokens, labels, documents, scored in zip(
        packed.tokens, packed.labels, packed.documents, packed.rows, strict=True
    ):
        for document in range(documents.max() + 1):
            inside = documents == document
            own = scored[inside] != len(given_rows)
            if not own.any():
                assert (tokens[inside] == 0).all()
                assert (labels[inside] == 0).all()
                continue
            number = scored[inside][own].max()
            assert (scored[inside][own] == number).all()
            assert number not in seen
            row = (*tokens[inside].tolist(), int(labels[inside][-1]))
            assert row[1:] == tuple(labels[inside].tolist())
            assert own.tolist() == sorted(own.tolist()), "what is scored is at the end"
            seen[int(number)] = Row(row, int(own.sum()))
    assert seen == dict(enumerate(given_rows))
    if not together:
        assert len(packing) == len(given_rows)


@pytest.mark.parametrize(("short", "sequences"), [(2, 10), (3, 15), (6, 30), (7, 60)])
def test_short_rows_share_sequences(short: int, sequences: int) -> None:
    packing = Packing([Row((1,) * (short + 1), 1)] * 60, 12, 0, together=True)
    assert len(packing) == sequences
