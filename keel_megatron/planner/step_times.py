"""Step times of many runs, in a process of its own: `python -m keel_megatron.planner.step_times`.

    step_times REQUEST ANSWER

REQUEST is a JSON file: `gpu`, the device type to predict for, or null to measure on this machine;
`runs`, a list of objects with `path`, `settings` and `processes`. ANSWER becomes a JSON file:
`ready`, seconds since 1970 when the packages that a run imports were imported, and `runs`, a list
of objects with `step_seconds`, or with `problem` for a run that cannot be measured. Runs that
differ in depth are measured once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from keel_megatron import compat
from keel_megatron.config.load import flatten, load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.layout.devices import device_named
from keel_megatron.planner.plan import Measured, make_plan

_OWN = (
    "model.blocks",
    "model.alpha",
    "training.name",
    "training.runs_dir",
    "training.seed",
    "training.steps",
    "optimizer.",
    "schedule.",
    "checkpoint.",
    "guard.",
    "tracking.",
)
"""Settings that do not change the time of a block."""


def step_times(gpu: str | None, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to a request's runs."""
    known: dict[str, Measured | None] = {}
    return [_step_time(gpu, run, known) for run in runs]


def _step_time(
    gpu: str | None, run: dict[str, Any], known: dict[str, Measured | None]
) -> dict[str, Any]:
    try:
        config = load_config(Path(run["path"]), run["settings"], world_size=run["processes"])
        measured = None if gpu else _measured(config, known)
        device = device_named(gpu or "cpu")
        plan = make_plan(config, run["processes"], device, measured)
        if not plan.fits:
            raise UserError(
                f"{config.model.sub_layers} sub-layers do not fit on {run['processes']} x "
                f"{device.name}; keel plan shows what would"
            )
    except UserError as error:
        return {"problem": str(error)}
    return {"step_seconds": plan.step_seconds}


def _measured(config: RunConfig, known: dict[str, Measured | None]) -> Measured | None:
    """Measured times of a run's pieces."""
    from keel_megatron.planner.measure import measure_pieces

    settings = {key: value for key, value in flatten(config).items() if not key.startswith(_OWN)}
    key = json.dumps(settings, sort_keys=True)
    if key not in known:
        known[key] = measure_pieces(config)
    return known[key]


def main(request: Path, answer: Path) -> None:
    """Answer a request."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    if asked["gpu"] is None:
        compat.install()
        import keel_megatron.planner.measure
        import keel_megatron.training.run  # noqa: F401  (what a run imports)
    ready = time.time()
    found = {"ready": ready, "runs": step_times(asked["gpu"], asked["runs"])}
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
