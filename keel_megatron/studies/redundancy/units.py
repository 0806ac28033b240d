"""What is removed: units of a model's depth, what their removal means, and what it costs.

A sub-layer is x' = N_out(alpha x + c F(G(x))) (architecture/residual.py). Taken out of a trained
model, it can leave two things:

    sub-layer   x' = x                the sub-layer is skipped with its norm (the default)
    branch      x' = N_out(alpha x)   the branch is zero; scale and outer norm stay

For a rule without outer norms and with alpha = 1 (pre_ln) they are the same. The default is what
pruning does: a layer that is deleted from a model (arXiv 2403.03853, 2403.17887) takes all of its
parameters with it, and no operation is left to run; and it is the plain reading of the paper's
appendix A, where one layer is removed. So rules are compared by what leaving out a part of their
depth costs. `branch` isolates what the branch computes: the outer norm's weights still act, and a
stream that has never been normalised (Keel's first block) still is. Where the two differ, the outer
norm's weights matter in themselves.
"""

from __future__ import annotations

from typing import Literal

Unit = Literal["sub-layer", "block"]
Removal = Literal["sub-layer", "branch"]

NOTHING = -1
"""In the place of a unit: nothing is removed."""


def size(unit: Unit) -> int:
    """Sub-layers of a unit."""
    return 2 if unit == "block" else 1


def count(sub_layers: int, unit: Unit) -> int:
    """Units of a model."""
    return sub_layers // size(unit)


def sub_layers_of(number: int, unit: Unit) -> range:
    """The sub-layers of a unit, numbered from 0 over the whole model."""
    return range(number * size(unit), (number + 1) * size(unit))


def passes(sub_layers: int, unit: Unit) -> int:
    """Passes of a sequence through a sub-layer for all removals, and for nothing removed.

    A removal costs what follows it, so with n units of w sub-layers, L = n w, and one walk down
    the whole model it is L + w n (n - 1) / 2, about L^2 / 2.

    Args:
        sub_layers: L.
        unit: what is removed.
    """
    n = count(sub_layers, unit)
    return sub_layers + size(unit) * n * (n - 1) // 2
