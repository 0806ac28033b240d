"""A build's task as a step of a datatrove pipeline, for its executors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from keel_megatron.corpus.cluster import run_task


class BuildStep(PipelineStep):
    """Does the jobs of one task: of `rank`, where `world_size` is the number of tasks.

    Args:
        folder: the folder that is being built.
    """

    name = "Keel-Megatron tokens"
    type = "TOKENIZER"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Do the task; hands on what came in, which is nothing."""
        run_task(Path(self.folder), rank, world_size, 1, print)
        yield from data or ()
