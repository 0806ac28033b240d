"""Host time of Python and autograd per block, measured on a CPU by `tools/bench/host.py`.

On CUDA the host runs the model's Python and launches kernels while the device executes earlier
ones. Its time does not depend on the shapes, so it is measured with tiny tensors on a CPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).with_name("host_times.json")
"""Written by `tools/bench/host.py`."""
_DEFAULT_RULE = "keel"


@dataclass(frozen=True)
class PassTimes:
    """Host time of a forward and of a backward pass, seconds, without launching kernels."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Calibration:
    """The measured figures."""

    machine: str
    date: str
    blocks: dict[str, PassTimes]
    """Per block of each residual rule."""
    qk_norm: PassTimes
    """What `model.qk_norm` adds to a block of the default rule."""
    compiled: PassTimes
    """Per compiled block (`kernels.compile`) of the default rule."""
    chunk: PassTimes
    """Per chunk, besides its blocks."""
    ends: PassTimes
    """Embedding, head and loss together."""

    def block(self, rule: str, *, compiled: bool, qk_norm: bool = False) -> PassTimes:
        """Per block of a rule; a compiled one scales like that of the default rule."""
        eager, more = self.blocks.get(rule, self.blocks[_DEFAULT_RULE]), self.qk_norm
        if qk_norm:
            eager = PassTimes(eager.forward + more.forward, eager.backward + more.backward)
        if not compiled:
            return eager
        default = self.blocks[_DEFAULT_RULE]
        return PassTimes(
            eager.forward * self.compiled.forward / default.forward,
            eager.backward * self.compiled.backward / default.backward,
        )

    @property
    def compiled_ratio(self) -> float:
        """Time of a compiled block relative to an eager one, both passes together."""
        eager = self.blocks[_DEFAULT_RULE]
        compiled = self.compiled.forward + self.compiled.backward
        return compiled / (eager.forward + eager.backward)


@cache
def calibration() -> Calibration:
    """The figures of `host_times.json`."""
    found = json.loads(FIGURES.read_text())
    return Calibration(
        found["machine"],
        found["date"],
        {rule: _times(one) for rule, one in found["blocks"].items()},
        _times(found["qk_norm"]),
        _times(found["compiled_block"]),
        _times(found["chunk"]),
        _times(found["ends"]),
    )


def _times(figures: dict[str, Any]) -> PassTimes:
    return PassTimes(figures["forward_us"] * 1e-6, figures["backward_us"] * 1e-6)
