"""The layouts at which the small Keel run must train like one process, and how far each is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.distributed import run_ranks
from tests.settings import settings
from tests.training.ranks import train_all

Found = list[tuple[float, float]]

TP2_SP_PP2_VPP2: dict[str, Any] = {
    "parallel__tensor": 2,
    "parallel__sequence": True,
    "parallel__pipeline": 2,
    "parallel__virtual_pipeline": 2,
}
# Stage 0 does not fit without recomputing some of its blocks (tests/layout/test_stages.py).
AUTO_RECOMPUTE: dict[str, Any] = {
    "parallel__pipeline": 2,
    "parallel__virtual_pipeline": 2,
    "parallel__recompute": "auto",
    "parallel__memory_gb": 0.0052,
}
# name -> (processes, overrides of the small Keel run)
MATRIX: dict[str, tuple[int, dict[str, Any]]] = {
    "full recompute": (1, {"parallel__recompute": "full"}),
    "TP 2": (2, {"parallel__tensor": 2}),
    "TP 2 + SP": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "TP 4 + SP": (4, {"parallel__tensor": 4, "parallel__sequence": True}),
    "PP 2": (2, {"parallel__pipeline": 2}),
    "PP 3, uneven": (3, {"parallel__pipeline": 3}),
    "PP 4": (4, {"parallel__pipeline": 4}),
    "PP 2 x VPP 2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "PP 2 x VPP 4": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 4}),
    "PP 2 x VPP 2, auto recompute": (2, AUTO_RECOMPUTE),
    "PP 2, the head alone": (2, {"parallel__pipeline": 2, "parallel__layout": [8, 0]}),
    "PP 2 x VPP 2, own layout": (
        2,
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "parallel__layout": [0, 4, 1, 3],
        },
    ),
    "DP 2": (2, {}),
    "DP 2, optimizer replicated": (2, {"parallel__distributed_optimizer": False}),
    "DP 4": (4, {}),
    "DP 4, optimizer replicated": (4, {"parallel__distributed_optimizer": False}),
    "TP 2 x PP 2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "TP 2 + SP x PP 2 x VPP 2": (4, TP2_SP_PP2_VPP2),
    "TP 2 x PP 2 x DP 2": (8, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}


@dataclass(frozen=True)
class Deviation:
    """Largest relative difference from one process over all steps."""

    loss: float
    grad_norm: float


def trained(
    world_size: int, runs: dict[str, dict[str, Any]], steps: int, timeout_seconds: float = 300.0
) -> dict[str, Found]:
    """Rank 0's figures of each run; all ranks report the same."""
    sections = [settings(**overrides) for overrides in runs.values()]
    ranks = run_ranks(
        world_size,
        train_all,
        sections,
        steps,
        timeout_seconds=timeout_seconds,
    )
    assert all(found == ranks[0] for found in ranks)
    return dict(zip(runs, ranks[0], strict=True))


def spread(
    layouts: dict[str, tuple[int, dict[str, Any]]], steps: int, timeout_seconds: float = 300.0
) -> dict[str, Found]:
    """All layouts, those of the same number of processes in one launch."""
    found: dict[str, Found] = {}
    for world_size in sorted({size for size, _overrides in layouts.values()}):
        chosen = {name: o for name, (size, o) in layouts.items() if size == world_size}
        found.update(trained(world_size, chosen, steps, timeout_seconds))
    return found


def deviation(found: Found, expected: Found) -> Deviation:
    """Of losses and of gradient norms; the last pair of each is the validation loss twice."""
    apart = [
        [abs(a - b) / abs(b) for a, b in zip(here, there, strict=True)]
        for here, there in zip(found, expected, strict=True)
    ]
    return Deviation(max(loss for loss, _ in apart), max(norm for _, norm in apart))
