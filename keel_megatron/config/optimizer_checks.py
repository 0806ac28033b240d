"""Checks of the optimizer's factors per kind of parameter and per range of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from keel_megatron.config.run import RunConfig


def _depth_rates(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Ranges lie within the model and do not overlap."""
    blocks = config.model.blocks
    covered: dict[int, int] = {}
    for number, entry in enumerate(config.optimizer.depth_rates):
        path = f"optimizer.depth_rates.{number}.blocks"
        first, last = entry.blocks
        if not 0 <= first <= last < blocks:
            yield (
                path,
                f"[{first}, {last}] must be the first and the last block of a range within "
                f"[0, {blocks - 1}] (model.blocks = {blocks})",
            )
            continue
        other = next((covered[block] for block in range(first, last + 1) if block in covered), None)
        if other is not None:
            yield path, f"[{first}, {last}] overlaps with optimizer.depth_rates.{other}"
        covered |= dict.fromkeys(range(first, last + 1), number)


def _tied_head(config: RunConfig) -> Iterator[tuple[str, str]]:
    factor = config.optimizer.rates.head
    if config.model.tie_embeddings and factor != 1.0:
        yield (
            "optimizer.rates.head",
            f"{factor:g} has nothing to apply to with model.tie_embeddings: true; set "
            "optimizer.rates.embeddings, which the shared matrix takes",
        )


OPTIMIZER_CHECKS: tuple[Callable[[RunConfig], Iterator[tuple[str, str]]], ...] = (
    _depth_rates,
    _tied_head,
)
