"""What the ranks of the tests of `training.initialize_from` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keel_megatron.checkpoint.places import Place
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.errors import UserError
from keel_megatron.training.initialize import open_start
from tests.checkpoint.ranks import Sections
from tests.checkpoint.state_ranks import engine_of, made_up, wrong_weights


def started(runs: list[Sections], seed: int) -> dict[str, list[str]]:
    """By run, what of its state is not that of an origin with made-up state of a seed."""
    found = {}
    for sections in runs:
        with engine_of(sections) as (config, runtime, engine):
            start = open_start(config, runtime, ResumePoint())
            assert start is not None
            start.load(engine.state, runtime)
            kept = config.training.keep_optimizer
            wrong = wrong_state(engine, seed, kept=kept)
            if hasattr(engine, "optimizer"):
                wrong += wrong_weights(engine, seed)
            found[config.training.name] = wrong
    return found


def wrong_state(engine: Any, seed: int, *, kept: bool) -> list[str]:
    """Which pieces of a checkpoint would not be the made-up ones; moments: zero, if not kept."""
    saved = engine.state.to_save(copy=True)
    saved.ready()
    wrong = [] if saved.common["optimizer"]["updates"] == (seed if kept else 0) else ["updates"]
    for piece in saved.pieces:
        state, name = piece.place.key.removeprefix("optimizer.state.").split(".", 1)
        wanted = _cut(made_up(f"{state} {name}", piece.place.shape, seed), piece.place)
        if state != "param" and not kept:
            wanted = torch.zeros_like(wanted)
        if not torch.equal(piece.values.cpu().view(-1), wanted):
            wrong.append(piece.place.key)
    return wrong


def _cut(whole: Tensor, place: Place) -> Tensor:
    axes = zip(place.offset, place.block, strict=True)
    block = whole[tuple(slice(first, first + size) for first, size in axes)]
    return block.reshape(-1)[place.start : place.stop]


def trained(paths: list[Path]) -> list[str | None]:
    """Train runs one after the other; the error of each that is refused."""
    from keel_megatron.training.run import run_training

    found: list[str | None] = []
    for path in paths:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(path.parent)
            try:
                run_training(path)
                found.append(None)
            except UserError as error:
                found.append(str(error))
    return found
