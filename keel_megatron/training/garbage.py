"""Python's garbage collection, at the same steps on all ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class GarbageCollection:
    """Collects after every `every`-th step, and never in between.

    A collection walks through every Python object, of which a deep model has a million. Python
    starts one whenever it has made enough new ones, at another moment on every rank, and the other
    stages of a pipeline wait for it. So automatic collection is off while a run trains; what the
    first step leaves (the model, the optimizer) is never walked through again.

    Args:
        every: steps between collections; 0 = leave Python's automatic collection on.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._frozen = False

    @contextmanager
    def controlled(self) -> Iterator[None]:
        """Within the block only `after_step` collects."""
        if not self._every or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.unfreeze()

    def after_step(self, step: int) -> None:
        """Collect if it is time.

        Args:
            step: the run's number of the step, the same on all ranks.
        """
        if gc.isenabled() or not self._every:
            return
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True
        elif step % self._every == 0:
            gc.collect()
