"""What the blocks need to know of a micro-batch besides its stream."""

from __future__ import annotations

from dataclasses import dataclass

from keel_megatron.model.documents import Documents
from keel_megatron.model.stream import Noise


@dataclass(frozen=True)
class MicroBatch:
    """Goes through Megatron-core's blocks as `attention_bias`, to recomputed blocks too."""

    documents: Documents | None = None
    """Attention is kept within them."""
    noise: Noise | None = None
    """For stochastic rounding of the stream."""
