"""Pipeline stages and their chunks: which blocks each holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Contiguous blocks that one stage computes together (a model chunk)."""

    first_block: int
    """Global index of the chunk's first block, from 0."""
    blocks: int
    """Number of blocks; 0 for a chunk with only the embedding or the head."""
    embedding: bool = False
    head: bool = False


@dataclass(frozen=True)
class Layout:
    """All chunks, in model order.

    Chunk i is model chunk i // pipeline of stage i % pipeline.
    """

    pipeline: int
    chunks: tuple[Chunk, ...]

    @property
    def virtual_pipeline(self) -> int:
        """Model chunks per stage."""
        return len(self.chunks) // self.pipeline

    def stage(self, pipeline_rank: int) -> tuple[Chunk, ...]:
        """The chunks of one stage, in order."""
        return self.chunks[pipeline_rank :: self.pipeline]

    def check(self, blocks: int) -> None:
        """Check that the chunks hold every block of the model once and in order.

        Raises:
            ValueError: a block is missing, duplicated or out of order.
        """
        if not self.chunks or len(self.chunks) % self.pipeline:
            raise ValueError(
                f"{len(self.chunks)} chunks do not divide evenly among {self.pipeline} stages"
            )
        expected = 0
        for number, chunk in enumerate(self.chunks):
            if chunk.first_block != expected or chunk.blocks < 0:
                raise ValueError(
                    f"chunk {number} starts at block {chunk.first_block}, not at {expected}"
                )
            expected += chunk.blocks
        if expected != blocks:
            raise ValueError(f"the chunks hold {expected} blocks, the model has {blocks}")
        if [c.embedding for c in self.chunks] != [True] + [False] * (len(self.chunks) - 1):
            raise ValueError("the embedding must be in the first chunk and nowhere else")
        if [c.head for c in self.chunks] != [False] * (len(self.chunks) - 1) + [True]:
            raise ValueError("the head must be in the last chunk and nowhere else")

    def to_megatron(self) -> list[list[str]]:
        """Megatron-core's `pipeline_model_parallel_layout`: the layers of every chunk."""
        return [
            ["embedding"] * chunk.embedding + ["decoder"] * chunk.blocks + ["loss"] * chunk.head
            for chunk in self.chunks
        ]


def from_counts(counts: list[int], pipeline: int) -> Layout:
    """A layout whose chunk i holds counts[i] blocks."""
    chunks = []
    first = 0
    for number, count in enumerate(counts):
        chunks.append(Chunk(first, count, number == 0, number == len(counts) - 1))
        first += count
    return Layout(pipeline, tuple(chunks))
