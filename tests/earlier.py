"""Turns a run and its dataset into what an earlier version would have written (format 2)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.data.dataset import open_dataset
from tests.datasets import documents_of, record, write_tokens

FINGERPRINT = "2" * 64


def as_earlier(run: Path, dataset: Path, cache: Path) -> Path:
    """Write the prepared data of an earlier version, and make the run's checkpoints name it.

    Args:
        run: a run's folder.
        dataset: its dataset folder, of one source.
        cache: data.cache_dir.

    Returns:
        The folder of prepared data.
    """
    prepared = cache / FINGERPRINT[:16]
    prepared.mkdir(parents=True)
    data = open_dataset(dataset, None)
    (source,) = data.sources
    counts = {}
    for part in ("train", "validation"):
        documents = documents_of(source, part)
        write_tokens(prepared / part, documents)
        counts[f"{part}_tokens"] = sum(map(len, documents))
        counts[f"{part}_documents"] = len(documents)
    shutil.copy(data.tokenizer_path, prepared / "tokenizer.model")
    (prepared / "sources.json").write_text("{}")
    files = {path.name: record(path) for path in sorted(prepared.iterdir())}
    origin: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "corpus": hashlib.sha256(b"text").hexdigest(),
        "tokenizer": None,
    }
    content = origin | counts | {"unigram_entropy": 5.0, "files": files}
    (prepared / "data.json").write_text(json.dumps(content))
    known = {n: {"bytes": f["bytes"], "sha256": f["sha256"]} for n, f in files.items()}
    for step in folder.steps(run):
        _rewrite(folder.step_folder(run, step), step, origin | {"files": known})
    return prepared


def without_tokenizers(run: Path) -> None:
    """Remove the tokenizer from a run and its checkpoints; still earlier versions kept none."""
    (run / "tokenizer.model").unlink()
    for step in folder.steps(run):
        path = folder.step_folder(run, step)
        files = manifest.read_manifest(path)
        del files["tokenizer.model"]
        (path / "tokenizer.model").unlink()
        manifest.write_manifest(path, step, files)


def _rewrite(checkpoint: Path, step: int, identity: dict[str, Any]) -> None:
    """Replace the identity of the data in a checkpoint."""
    files = manifest.read_manifest(checkpoint)
    state = json.loads((checkpoint / manifest.STATE).read_text())
    state["data"] = identity
    files[manifest.STATE] = manifest.write_json(checkpoint / manifest.STATE, state)
    manifest.write_manifest(checkpoint, step, files)
