"""Which blocks of a stage are recomputed: `parallel.recompute`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from keel_megatron.config.kernel_checks import supports_light_recomputation
from keel_megatron.config.run import RunConfig


class Recomputation(NamedTuple):
    """Number of blocks per chunk of a stage: first the fully recomputed ones, then the light."""

    full: tuple[int, ...]
    """Blocks of which only the input is kept."""
    light: tuple[int, ...]
    """Blocks whose SwiGLU and inner norms are recomputed."""


def nothing(blocks: Sequence[int]) -> Recomputation:
    """No block."""
    return first(blocks, 0, 0)


def first(blocks: Sequence[int], full: int, light: int) -> Recomputation:
    """The first `full` blocks of a stage fully, and the next `light` lightly."""
    whole, either = _first(blocks, full), _first(blocks, full + light)
    return Recomputation(whole, tuple(b - a for a, b in zip(whole, either, strict=True)))


def _first(blocks: Sequence[int], count: int) -> tuple[int, ...]:
    taken = []
    for chunk in blocks:
        taken.append(min(chunk, count))
        count -= taken[-1]
    return tuple(taken)


def most(config: RunConfig, blocks: Sequence[int]) -> Recomputation:
    """What frees the most memory of what the setting permits."""
    mode, total = config.parallel.recompute, sum(blocks)
    return first(blocks, total if mode in ("full", "auto") else 0, total if mode == "light" else 0)


def least(
    config: RunConfig, blocks: Sequence[int], fits: Callable[[Recomputation], bool]
) -> Recomputation | None:
    """The least recomputation that fits in memory and the setting permits.

    Under `auto`: light for the fewest blocks; where light for all of them is not enough, full for
    the fewest, and then light for the fewest of the others. A light block frees more memory per
    second that it takes than a full one. Earlier chunks hold at least as many micro-batches in
    flight as later ones, so their blocks free the most memory and come first.

    Args:
        config: the run.
        blocks: blocks per chunk.
        fits: whether the stage fits in memory.

    Returns:
        The counts, or None if the stage does not fit.
    """
    if config.parallel.recompute != "auto":
        found = most(config, blocks)
        return found if fits(found) else None
    total = sum(blocks)
    if fits(nothing(blocks)):
        return nothing(blocks)
    light = supports_light_recomputation(config)

    def others(full: int) -> Recomputation:
        return first(blocks, full, total - full if light else 0)

    full = _fewest(total, lambda count: fits(others(count)))
    if full is None:
        return None
    if not light:
        return first(blocks, full, 0)
    rest = _fewest(total - full, lambda count: fits(first(blocks, full, count)))
    return first(blocks, full, total - full if rest is None else rest)


def _fewest(largest: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest count from 0 that fits; more also do."""
    if fits(0):
        return 0
    if not fits(largest):
        return None
    low, high = 0, largest  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
