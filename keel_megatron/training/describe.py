"""Description of a run before its first step, for MLflow and the log."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from keel_megatron.checkpoint.manifest import CONFIG, COPIED
from keel_megatron.layout.stage_table import write_stages
from keel_megatron.layout.stages import Partition
from keel_megatron.mlflow_delivery.tags import code_tags, place_tags
from keel_megatron.runtime import machines
from keel_megatron.runtime.device import gpu_name
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.tracker import Tracker


def describe_run(
    tracker: Tracker, runtime: Runtime, partition: Partition, *, resumes: bool
) -> None:
    """Record the run's machines and stages in its folder, and tell MLflow; collective.

    MLflow gets tags with code, layout and hosts, and the run's own files.

    Args:
        tracker: the run's tracker.
        runtime: this rank's place.
        partition: written to `stages.json` in the run's folder.
        resumes: the run continues from a checkpoint of earlier starts.
    """
    gpu = gpu_name(runtime.device)
    places = runtime.gather(machines.this_place(gpu))
    if not runtime.is_main:
        return
    layout = (
        f"TP {runtime.tensor_size} x PP {runtime.pipeline_size} x VPP "
        f"{partition.layout.virtual_pipeline} x DP {runtime.data_size}"
    )
    device = gpu or platform.machine() + " CPU"
    tracker.tags(code_tags() | place_tags(layout, device, [place.host for place in places]))
    stages = tracker.folder / "stages.json"
    path = tracker.folder / machines.FILE
    try:
        earlier = machines.recorded(tracker.folder) if resumes else []
        machines.record(tracker.folder, machines.machines(places), earlier)
        path = stages
        write_stages(partition, path)
    except OSError as error:  # a full disk: the run continues, `keel plan` prints the stages
        tracker.say(f"cannot write {path}: {error.strerror}")
    for path in (*(tracker.folder / name for name in (CONFIG, *COPIED)), stages):
        if path.is_file():
            tracker.artifact(path)


def version_changes(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """One line for each package whose version differs from that which wrote the checkpoint.

    Args:
        saved: versions in the checkpoint (`runtime.versions.package_versions`).
        current: versions in this process.
    """
    return [
        f"{name} was {saved.get(name, 'absent')} when the checkpoint was written, now "
        f"{current.get(name, 'absent')}: the last bits may differ"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
