"""A stage that would not hold the blocks that the layout gives it is refused, on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.distributed import run_ranks
from tests.settings import small_config

PIPELINE = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}


def refusals() -> list[str]:
    """What building says when the layout loses a block, and when Megatron-core builds another."""
    from keel_megatron.layout.chunks import from_counts
    from keel_megatron.layout.stages import own_partition
    from keel_megatron.model import language_model
    from keel_megatron.runtime.distributed import start

    config = small_config(**PIPELINE)
    said = []

    def refused(**changes: Any) -> str:
        try:
            language_model.build_model(config, runtime, **changes)
        except ValueError as error:
            return str(error)
        return "built"

    with start(config.parallel, config.training) as runtime:
        said.append(refused())
        decided = own_partition(config, runtime)
        for counts in ([2, 2, 2, 1], [2, 2, 3, 2]):
            lossy = replace(decided, layout=from_counts(counts, 2))
            said.append(refused(partition=lossy))
        whole = language_model.chunk_spec
        language_model.chunk_spec = lambda run, modules, blocks: whole(run, modules, blocks[:-1])
        said.append(refused())
    return said


def offsets() -> list[list[list[int]]]:
    """The global block numbers of every chunk, where chunks are uneven or empty."""
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    found = []
    for layout in ([0, 4, 1, 3], [3, 1, 4, 0]):
        config = small_config(**PIPELINE, parallel__layout=layout)
        with start(config.parallel, config.training) as runtime:
            chunks: list[Any] = build_model(config, runtime)
            found.append([[l.layer_number - 1 for l in c.decoder.layers] for c in chunks])
    return found


def test_lost_and_doubled_blocks_are_refused_on_every_rank() -> None:
    for rank, (whole, lost, doubled, otherwise) in enumerate(run_ranks(2, refusals)):
        assert whole == "built"
        assert lost == "the chunks hold 7 blocks, the model has 8"
        assert doubled == "the chunks hold 9 blocks, the model has 8"
        first = 2 * rank
        assert otherwise == (
            f"the layout gives this stage blocks {[first, first + 1]}, it holds {[first]}"
        )


def test_uneven_and_empty_chunks_hold_their_blocks() -> None:
    first, second = run_ranks(2, offsets)
    assert first == [[[], [4]], [[0, 1, 2], [4, 5, 6, 7]]]
    assert second == [[[0, 1, 2, 3], [5, 6, 7]], [[3], []]]
