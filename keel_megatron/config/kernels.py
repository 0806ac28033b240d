"""`kernels`: whose modules the blocks are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.base import Section


class KernelsConfig(Section):
    """The family of modules behind the same mathematics."""

    backend: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto",
        description=(
            "torch = Megatron-core's parallel linears and torch's attention; "
            "transformer_engine = Transformer Engine's, where it is installed; auto = torch."
        ),
    )
