"""Which source the k-th sample of a run comes from.

Samples are in blocks of `BLOCK`, in each of which every source has a fixed quota; a permutation
orders a block. So the source of sample k, and the number of that source's samples before it, depend
on the quotas, the seed and k alone, and are found without counting up to k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keel_megatron.errors import UserError

BLOCK: Final = 1000
"""Samples per block: the resolution of the sources' shares."""
_TAG: Final = 0x626C656E64
"""Keeps the blend's random numbers apart from those of the order of samples."""


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Samples per block of each source: its share of `BLOCK`, by the largest remainder.

    Args:
        weights: positive, by source.

    Raises:
        UserError: a source's share is too small to give it a sample in every block.
    """
    total = sum(weights.values())
    exact = {name: BLOCK * weight / total for name, weight in weights.items()}
    found = {name: int(share) for name, share in exact.items()}
    left = BLOCK - sum(found.values())
    by_remainder = sorted(exact, key=lambda name: found[name] - exact[name])  # stable
    for name in by_remainder[:left]:
        found[name] += 1
    for name, quota in found.items():
        if quota == 0:
            least = (total - weights[name]) / (BLOCK - 1)
            raise UserError(
                f"data.sources: the weight of {name}, {weights[name]:g}, is too small compared "
                f"with the others' {total - weights[name]:g}: shares are multiples of 1/{BLOCK}. "
                f"Give it a weight of at least {least:.3g}, or remove it"
            )
    return found


def shares(counts: Mapping[str, int], total: int) -> str:
    """Shares of samples by source, as text."""
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items())


class Blend:
    """The source of every sample.

    Args:
        quotas: samples per block of each source; their sum is `BLOCK`. With one source, there is
            nothing to permute.
        seed: the run's seed.
    """

    def __init__(self, quotas: Sequence[int], seed: int) -> None:
        self._quotas = np.array(quotas, dtype=np.int64)
        self._seed = seed
        self._block = -1
        self._sources: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._before: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """Number of the source of a sample, and number of its samples before this one."""
        if len(self._quotas) == 1:
            return 0, sample
        block, place = divmod(sample, BLOCK)
        if block != self._block:
            self._permute(block)
        source = int(self._sources[place])
        return source, block * int(self._quotas[source]) + int(self._before[place])

    def counts(self, samples: int) -> list[int]:
        """Number of samples of each source among the first `samples`."""
        if len(self._quotas) == 1:
            return [samples]
        block, rest = divmod(samples, BLOCK)
        if block != self._block:
            self._permute(block)
        begun = np.bincount(self._sources[:rest], minlength=len(self._quotas))
        counts: list[int] = (block * self._quotas + begun).tolist()
        return counts

    def _permute(self, block: int) -> None:
        """Compute the order of a block."""
        generator = np.random.Generator(np.random.PCG64([self._seed, _TAG, block]))
        repeated = np.repeat(np.arange(len(self._quotas)), self._quotas)
        self._sources = generator.permutation(repeated)
        by_source = np.argsort(self._sources, kind="stable")
        firsts = np.cumsum(self._quotas) - self._quotas
        self._before = np.empty(BLOCK, dtype=np.int64)
        self._before[by_source] = np.arange(BLOCK) - np.repeat(firsts, self._quotas)
        self._block = block
