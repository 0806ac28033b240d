"""Small complete checkpoints, made without a run; and payloads that would show if they ran."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.shard_file import Part, blocks


def write_checkpoint(run: Path, step: int, ranks: int = 2, config: bytes = b"model: {}\n") -> Path:
    """A checkpoint with the files of a real one."""
    partial = folder.begin(run, step)
    files = {}
    for rank in range(ranks):
        part = Part(f"weight[{rank}]", "F32", (1, 8), lambda: bytes(range(32)))
        name = manifest.shards_name(rank)
        metadata = {"rank_state": "{}"}
        files[name] = manifest.write_checked(partial / name, blocks([part], metadata))
    contents: dict[str, Any] = {
        manifest.STATE: {
            "step": step,
            "consumed_samples": 16 * step,
            "layout": {"tensor": 1, "pipeline": 2, "virtual_pipeline": 1, "data": 1},
            "device": "cpu",
            "packages": {"torch": "2.13.0"},
            "data": {"fingerprint": "feed" * 16},
            "extras": {"guard": {"skipped": 1}, "mlflow_run_id": None},
            "common": {},
        },
        manifest.INDEX: {},
        manifest.BACKEND: {"sharded_backend": "keel_safetensors"},
    }
    for name, content in contents.items():
        files[name] = manifest.write_json(partial / name, content)
    files[manifest.CONFIG] = manifest.write_checked(partial / manifest.CONFIG, [config])
    manifest.write_manifest(partial, step, files)
    return folder.publish(partial)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.marker),)


def plant(checkpoint: Path, name: str, marker: Path, *, listed: bool) -> None:
    """Put a malicious pickle in the place of a file; in the manifest too if it is to be listed."""
    content = pickle.dumps(Payload(marker))
    (checkpoint / name).write_bytes(content)
    if listed:
        path = checkpoint / manifest.MANIFEST
        whole = json.loads(path.read_text())
        files = {key: manifest.FileRecord(**record) for key, record in whole["files"].items()}
        files[name] = manifest.FileRecord(len(content), f"{zlib.crc32(content):08x}")
        manifest.write_manifest(checkpoint, whole["step"], files)
