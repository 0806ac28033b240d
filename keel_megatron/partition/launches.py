"""The kernels that a block launches on CUDA, part by part: what the host and the gaps cost.

Counted from the code for bf16, one device a stage and Megatron-core's engine; `make bench-gpu`
counts them in a trace.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launches:
    """One part's kernels."""

    part: str
    forward: int
    backward: int
    what: str


BLOCK: tuple[Launches, ...] = (
    Launches("products", 4, 8, "qkv, proj, fc1, fc2; going back one each for input and weight"),
    Launches("rotary", 7, 7, "query and key a product and two halves each; value copied"),
    Launches(
        "attention",
        1,
        6,
        "flash; going back row sums, its kernel, a cast, key and value "
        "summed over their group, an emptied buffer",
    ),
    Launches("SwiGLU", 1, 1, "Megatron-core's compiled kernel"),
    Launches("joins", 2, 4, "the fused kernel twice; going back also the gains' partial sums"),
    Launches(
        "gradient sums", 0, 8, "DDP adds each of four weights' and four gains' to the fp32 sum"
    ),
)

COMPILED: tuple[Launches, ...] = (
    Launches("products", 4, 8, "as before"),
    Launches("rotary", 2, 2, "query and key; going back one tensor, key's part apart"),
    Launches("attention", 1, 6, "as before"),
    Launches("SwiGLU", 1, 1, "fused"),
    Launches(
        "joins", 2, 8, "fused; going back a pass for the stream, one for the gains in two steps"
    ),
    Launches("gradient sums", 0, 8, "as before"),
)
"""What `kernels.compile` should make of it."""


def total(parts: tuple[Launches, ...]) -> tuple[int, int]:
    """Kernels of a block, forward and backward."""
    return sum(part.forward for part in parts), sum(part.backward for part in parts)
