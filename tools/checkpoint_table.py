"""Cost of saving and loading the 1024-sub-layer model: docs/benchmarks/checkpoints.md.

python tools/checkpoint_table.py                # trace this version, and write the page
python tools/checkpoint_table.py --before DIR   # trace an older checkout too, as "before"

The first replica's rank of the first stage is traced (docs/tracing.md), in a process of its own,
which imports the program from its folder. `git archive 7d79c6f` is the last version in which
Megatron-core gathered the optimizer's state (checkpoint format 1). What was traced is kept in
docs/benchmarks/checkpoints.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPUS = {1: 4, 16: 64, 256: 1024}
"""Replicas of the recipe's four stages, and the GPUs that they take."""
OUT = ROOT / "docs" / "benchmarks" / "checkpoints"


def traced(gpus: int) -> dict[str, Any]:
    """A save and a load of a rank, in bytes; once a process, of the version that it imports."""
    from keel_megatron import compat

    compat.install()
    from keel_megatron.config.load import load_config
    from keel_megatron.layout.devices import device_named
    from keel_megatron.layout.stages import partition
    from keel_megatron.planner.trace import rank

    config = load_config(Path("yaml/paper/keel_1024.yaml"), (), world_size=gpus)
    request = rank.Request(config, gpus, device_named("h200"), 0)
    tracker = rank._install(request)
    runtime = rank._start_groups(request)
    tracker.groups = rank.group_names()
    parts = partition(config, request.replicas, request.device)
    with tracker:
        engine = rank._build(request, runtime, parts, tracker)
        tracker.host_factories = True
        tracker.enter("save")
        states = tracker.now
        state, written = _save(engine)
        tracker.enter("between")
        del state  # files and memory of a save are kept for the next one; a load starts without
        tracker.enter("load")
        read = _load(engine)
    save, load = tracker.phases["save"], tracker.phases["load"]
    return {
        "states": states,
        "written": written,
        "save_device": save.peak,
        "save_host": save.host_peak,
        "save_sent": _sent(save),
        "read": read["bytes"],
        "load_device": load.peak,
        "load_host": max(load.host_peak, read["host"]),
        "load_sent": _sent(load),
    }


def _sent(phase: Any) -> int:
    return sum(size for _number, size in phase.messages.values())


def _save(engine: Any) -> tuple[Any, int]:
    """What a save holds until it is written, and the bytes that the rank writes."""
    from keel_megatron.checkpoint import sharding

    if hasattr(sharding, "split_state"):  # format 1
        parts, *rest = sharding.split_state(engine.state.to_save(), copy=True, validate=False)
        return (parts, rest), sum(part.bytes for part in parts)
    saved = engine.state.to_save(copy=True)
    return saved, sum(part.bytes for part in sharding.parts(saved))


def _load(engine: Any) -> dict[str, int]:
    """Bytes read from files, and the largest tensor that is made on the host in between."""
    from keel_megatron.checkpoint import sharding

    found = {"bytes": 0, "host": 0}

    def fill(target: Any) -> None:
        """What is read: values that fill a tensor."""
        size = target.numel() * target.element_size()
        found["bytes"] += size
        if target.is_cuda and hasattr(sharding, "Reader"):
            found["host"] = max(found["host"], size)

    if hasattr(sharding, "Reader"):
        reader: Any = sharding.Reader
        reader.fill = lambda _self, _place, target, _names=(): fill(target)
        common: dict[str, Any] = {"optimizer": {"updates": 1}}
        engine.state.apply(engine.state.read(Path(), {}, common))
        return found
    tensors: Any = sharding._Tensors  # type: ignore[attr-defined]
    tensors._fill = lambda _self, _item, target: fill(target)
    determined: Any = sharding
    determined.determine_global_metadata = lambda _sharded: (None, None)
    determined.validate_sharding_integrity = lambda _all: None
    state = engine.state._sharded(is_loading=True)
    groups = [dict(group) for group in _groups(engine)]
    common = {"optimizer": {"optimizer": {"param_groups": groups}}}
    loaded = sharding.load_state(Path(), state, {}, common)  # type: ignore[attr-defined]
    engine.state.apply(loaded)
    return found


def _groups(engine: Any) -> list[dict[str, Any]]:
    (inner,) = engine.optimizer.chained_optimizers
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "step": 1}
        for group in inner.optimizer.param_groups
    ]


def run(folder: Path, gpus: int) -> dict[str, Any]:
    """`traced` in a process that imports the program from a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(gpus)]
    done = subprocess.run(
        command, cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(results: dict[str, Any]) -> list[str]:
    """A line for every version and number of replicas."""
    header = ("format", "DP", "states", "written", "save: device", "host", "sent", "read")
    lines = ["| " + " | ".join((*header, "load: device", "host", "sent")) + " |", "|-" * 11 + "|"]
    names = ("states", "written", "save_device", "save_host", "save_sent")
    names += ("read", "load_device", "load_host", "load_sent")
    for version, title in (("before", "1"), ("now", "2")):
        for replicas, one in results.get(version, {}).items():
            sizes = [f"{one[name] / 1e9:.2f}" for name in names]
            lines.append("| " + " | ".join((title, replicas, *sizes)) + " |")
    return lines


def page(results: dict[str, Any]) -> str:
    sys.path.insert(0, str(ROOT))  # not before: a trace may be of another checkout
    from keel_megatron.runtime.machines import cpu_name

    day = datetime.date.today().isoformat()
    table = "\n".join(rows(results))
    return f"""# Cost of saving and loading checkpoints

`python tools/checkpoint_table.py` traces rank 0 of the 1024-sub-layer recipe
(`yaml/paper/keel_1024.yaml`: 4 pipeline stages of 8 chunks) for 4, 64 and 1,024 H200 GPUs, without
a GPU ([Tracing](../tracing.md)). All figures are in GB (1e9 bytes). `states`: weights, gradients,
master weights and moments on the device. `written` and `read`: bytes in files. `device` and `host`:
peak memory of the device, including the states, and of the host, during a save or a load. `sent`:
bytes of collectives.

{table}

Format 1 is that of earlier versions (`git archive 7d79c6f`): Megatron-core gathered the master
weights and moments of all replicas on every replica, replica 0 wrote them with the weights, and
every replica read all of them. In format 2 every replica writes and reads its own slices. After a
load, the weights are cast from the master weights and gathered once. Files are memory-mapped for
reading; their pages are not counted. Nothing here ran on a GPU. Traced on a core of {cpu_name()},
{day}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="an older checkout to trace too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(traced(options.one)))
        return
    store = OUT.with_suffix(".json")
    results = json.loads(store.read_text()) if store.exists() else {}
    folders = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    for version, folder in folders.items():
        results[version] = {str(replicas): run(folder, gpus) for replicas, gpus in GPUS.items()}
        store.write_text(json.dumps(results, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
