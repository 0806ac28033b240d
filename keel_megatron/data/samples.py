"""The samples of a run: which sequence of which source is the k-th."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel_megatron.data.blend import Blend
from keel_megatron.data.sequences import Sequence, SequenceDataset


class SampleOrder:
    """Order of a source's samples: a new permutation every epoch.

    It does not depend on the number of steps, the batch size or the layout.

    Args:
        samples: number of samples in the source.
        seed: the run's seed.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, consumed: int) -> int:
        epoch, position = divmod(consumed, self.samples)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._permutation = generator.permutation(self.samples)
            self._epoch = epoch
        return int(self._permutation[position])


@dataclass(frozen=True)
class Place:
    """Where a sample comes from."""

    source: int
    """Number of the source."""
    sequence: int
    """Number of the sequence in the source's dataset."""
    epoch: int
    """Epoch of the source, from 0 on."""


class Samples:
    """The samples of a run, in order.

    Sample k depends on the sources, the quotas, the seed and k alone.

    Args:
        sources: the training sequences of each source.
        quotas: samples per block of each (data/blend.py).
        seed: the run's seed.
    """

    def __init__(self, sources: List[SequenceDataset], quotas: List[int], seed: int) -> None:
        self.sources = sources
        self._blend = Blend(quotas, seed)
        self._orders = [SampleOrder(len(source), seed) for source in sources]

    def locate(self, sample: int) -> Place:
        """Where a sample comes from."""
        source, count = self._blend[sample]
        order = self._orders[source]
        return Place(source, order[count], count // order.samples)

    def counts(self, samples: int) -> dict[str, int]:
        """Number of samples of each source among the first `samples`."""
        names = [source.name for source in self.sources]
        return dict(zip(names, self._blend.counts(samples), strict=True))

    def describe(self, samples: int) -> str:
        """Realised shares of the first `samples`, and epochs of each source, as text."""
        return "; ".join(
            f"{name} {count / max(1, samples):.2%}, {count / order.samples:.2f} epochs"
            for (name, count), order in zip(self.counts(samples).items(), self._orders, strict=True)
        )

    def read(self, sample: int, *, tokens: bool = True) -> Sequence:
        """A sample; without `tokens`, only where its documents end."""
        place = self.locate(sample)
        return self.sources[place.source].read(place.sequence, tokens=tokens)
