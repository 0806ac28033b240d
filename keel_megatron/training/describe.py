"""Description of a run before its first step, for MLflow and the log."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping

import torch

from keel_megatron.checkpoint.manifest import CONFIG, COPIED
from keel_megatron.layout.stage_table import write_stages
from keel_megatron.layout.stages import Partition
from keel_megatron.mlflow_delivery.tags import code_tags, place_tags
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.tracker import Tracker


def describe_run(tracker: Tracker, runtime: Runtime, partition: Partition) -> None:
    """Tag the MLflow run with code, layout and hosts, and upload the run's own files; collective.

    Args:
        tracker: the run's tracker.
        runtime: this rank's place.
        partition: written to `stages.json` in the run's folder.
    """
    hosts = runtime.gather(socket.gethostname())
    if not runtime.is_main:
        return
    layout = (
        f"TP {runtime.tensor_size} x PP {runtime.pipeline_size} x VPP "
        f"{partition.layout.virtual_pipeline} x DP {runtime.data_size}"
    )
    cuda = runtime.device.type == "cuda"
    device = torch.cuda.get_device_name(runtime.device) if cuda else platform.machine() + " CPU"
    tracker.tags(code_tags() | place_tags(layout, device, hosts))
    stages = tracker.folder / "stages.json"
    try:
        write_stages(partition, stages)
    except OSError as error:  # a full disk: the run continues, `keel plan` prints the same
        tracker.say(f"cannot write {stages}: {error.strerror}")
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
