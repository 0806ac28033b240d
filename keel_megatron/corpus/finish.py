"""Turns the jobs' results into a dataset folder: shards, held-out documents, data.json."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keel_megatron.corpus.contents import Contents, sources_sha256
from keel_megatron.corpus.documents import Source
from keel_megatron.corpus.plan import JOBS, PLAN, Job, Plan, read_units
from keel_megatron.corpus.ready_tokens import token_counts
from keel_megatron.corpus.tokenize import (
    Extreme,
    JobResult,
    Rejected,
    path_of,
    result_of,
    save_array,
)
from keel_megatron.corpus.writer import LONGEST, join, token_type, write_index
from keel_megatron.data.manifest import (
    MANIFEST,
    SHARDS,
    FileRecord,
    Manifest,
    Shard,
    Skipped,
    SourceRecord,
)
from keel_megatron.data.shards import TokenShard, map_array
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.tables import count
from keel_megatron.runtime.versions import package_versions

_PACKAGES = ("numpy", "sentencepiece", "tokenizers", "gigatoken", "pyarrow")


@dataclass
class _Built:
    """A shard's jobs, and its documents."""

    jobs: list[Job]
    results: list[JobResult]
    lengths: NDArray[np.int32]
    held: NDArray[np.int64]
    """Numbers of its held-out documents, ascending."""

    @property
    def is_ready(self) -> bool:
        """Whether its tokens are used in place."""
        return self.jobs[0].kind == "tokens"

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations."""
        return self.jobs[0].kind == "conversations"


def unfinished(folder: Path, plan: Plan) -> list[Job]:
    """The jobs that are not complete."""
    return [job for job in plan.jobs if result_of(folder, job) is None]


def finish(
    folder: Path, plan: Plan, sources: Sequence[Source], contents: Contents, fraction: float
) -> Manifest:
    """Make the shards and data.json from the complete jobs; to be repeated after an interruption.

    data.json is written last, when the rest is on the disk.

    Args:
        folder: the folder that is being built.
        plan: its plan.
        sources: the sources.
        contents: sizes and hashes of their files.
        fraction: `data.validation_fraction`.

    Raises:
        UserError: a source has no document, or too few to hold one out.
        OSError: the folder cannot be written.
    """
    (folder / SHARDS).mkdir(exist_ok=True)
    counts = np.zeros(plan.tokenizer.vocab_size, dtype=np.int64)
    records = []
    names: set[str] = set()
    for number, source in enumerate(sources):
        every = list(_shards_of(folder, plan, number))
        results = [result for shard in every for result in shard.results]
        built = [shard for shard in every if len(shard.lengths)]
        _check_text(source, built, results)
        counts += sum(
            map_array(path_of(folder, job, "counts.npy")) for b in built for job in b.jobs
        )
        counts += _hold_out(folder, plan, source, built)
        shards = tuple(_write(folder, plan, shard, names) for shard in built)
        records.append(_source_record(source, contents, shards, results))
    manifest = Manifest(
        fingerprint=plan.fingerprint,
        tokenizer=plan.tokenizer,
        chat_template=plan.chat_template,
        validation_fraction=fraction,
        unigram_entropy=entropy(counts),
        sources=tuple(records),
        versions=package_versions(_PACKAGES),
    )
    # With data.json the folder is complete: what it describes must survive a crash before it does.
    _sync(*folder.iterdir(), *(folder / SHARDS).iterdir(), folder)
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def clean(folder: Path) -> None:
    """Remove what only the build needs, and make data.json safe against a crash of the machine.

    An interrupted one may be repeated.
    """
    shutil.rmtree(folder / JOBS, ignore_errors=True)
    (folder / PLAN).unlink(missing_ok=True)
    _sync(folder / MANIFEST, folder)


def _sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution with these counts."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def _shards_of(folder: Path, plan: Plan, source: int) -> Iterator[_Built]:
    """The shards of a source, with the documents of all jobs joined."""
    own = (job for job in plan.jobs if job.source == source)
    for _, group in groupby(own, key=lambda job: job.shard):
        jobs = list(group)
        results = [_complete(folder, job) for job in jobs]
        lengths = [map_array(path_of(folder, job, "lengths.npy")) for job in jobs]
        if jobs[0].kind == "part":
            yield _Built(jobs, results, *_joined(jobs, lengths))
        else:
            yield _Built(jobs, results, lengths[0], map_array(path_of(folder, jobs[0], "held.npy")))


def _complete(folder: Path, job: Job) -> JobResult:
    result = result_of(folder, job)
    if result is None:
        raise UserError(f"{folder}: job {job.name} is not complete; build again to resume")
    return result


def _joined(
    jobs: list[Job], lengths: list[NDArray[np.int32]]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Lengths of the texts of which the jobs are parts, and the numbers of the held-out ones."""
    found: list[int] = []
    held: list[int] = []
    length = 0
    for job, part in zip(jobs, lengths, strict=True):
        length += int(part.sum(dtype=np.int64))
        if not job.ends:
            continue
        whole, rest = divmod(length, LONGEST)  # as TokenWriter cuts
        new = [LONGEST] * whole + [rest] * (rest > 0)
        if job.held_out:
            held += range(len(found), len(found) + len(new))
        found += new
        length = 0
    return np.array(found, dtype=np.int32), np.array(held, dtype=np.int64)


def _check_text(source: Source, built: list[_Built], results: list[JobResult]) -> None:
    """Check that a source has training documents.

    Raises:
        UserError: it has none.
    """
    if all(shard.jobs[0].validation for shard in built):
        bad = _skipped("damaged", [result.bad for result in results])
        why = f"; skipped {count(bad.count, 'damaged record')}, such as {bad.first}" if bad else ""
        raise UserError(f"{source.setting}: there is no text in {source.description}{why}")


def _hold_out(
    folder: Path, plan: Plan, source: Source, built: list[_Built]
) -> NDArray[np.int64] | int:
    """Hold out one document if none was, and keep one if all were; returns the counts' change.

    Raises:
        UserError: there is only one document.
    """
    own = [shard for shard in built if not shard.jobs[0].validation]
    documents = sum(len(shard.lengths) for shard in own)
    if len(own) < len(built):
        return 0
    held = sum(len(shard.held) for shard in own)
    if 0 < held < documents:
        return 0
    if documents == 1:
        raise UserError(
            f"{source.setting}: {source.description} has only one document, and at least one is "
            "held out for validation; add documents, or give separate validation files "
            "(data.sources: validation)"
        )
    if held == 0:
        shard, found = _extreme(own, lambda result: result.lowest, -1)
        shard.held = np.array([found.document], dtype=np.int64)
        return -_counts_of(folder, plan, shard, found.document)
    shard, found = _extreme(own, lambda result: result.highest, 1)
    shard.held = shard.held[shard.held != found.document]
    return _counts_of(folder, plan, shard, found.document)


def _extreme(
    shards: list[_Built], which: Callable[[JobResult], Extreme | None], sign: int
) -> tuple[_Built, Extreme]:
    """The document with the smallest or largest hash of all shards."""
    found = [(s, e) for s in shards for r in s.results if (e := which(r)) is not None]
    return max(found, key=lambda pair: sign * pair[1].hash)


def _counts_of(folder: Path, plan: Plan, shard: _Built, document: int) -> NDArray[np.int64]:
    """How often each token occurs in a document."""
    start = int(shard.lengths[:document].sum(dtype=np.int64))
    count = int(shard.lengths[document])
    job = shard.jobs[0]
    if shard.is_ready:
        (unit,) = read_units(folder, job)
        ready = TokenShard(Path(unit.file.location.removesuffix(".bin")))
        return token_counts(ready, document, plan.tokenizer.vocab_size)
    dtype = token_type(plan.tokenizer.vocab_size)
    path = path_of(folder, job, "bin")
    path = path if path.exists() else folder / SHARDS / f"{job.shard}.bin"
    tokens = np.fromfile(path, dtype, count, offset=start * dtype.itemsize)
    if shard.is_chat:
        path = path_of(folder, job, "mask")
        path = path if path.exists() else folder / SHARDS / f"{job.shard}.mask"
        tokens = tokens[np.fromfile(path, np.uint8, count, offset=start) == 1]
    return np.bincount(tokens.astype(np.int64), minlength=plan.tokenizer.vocab_size)


def _write(folder: Path, plan: Plan, shard: _Built, names: set[str]) -> Shard:
    """Write a shard's files, and describe it."""
    first = shard.jobs[0]
    files: dict[Literal["bin", "idx", "npy", "mask"], FileRecord] = {}
    if shard.is_ready:
        name = _free_name(_prefix_name(folder, first), names)
        ready = shard.results[0].files
        files = {"bin": FileRecord(**ready["bin"]), "idx": FileRecord(**ready["idx"])}
    else:
        name = _free_name(first.shard, names)
        prefix = folder / SHARDS / name
        digest = _place_tokens(folder, shard, Path(f"{prefix}.bin"))
        files["bin"] = _record(Path(f"{prefix}.bin"), digest)
        write_index(Path(f"{prefix}.idx"), shard.lengths, token_type(plan.tokenizer.vocab_size))
        files["idx"] = _record(Path(f"{prefix}.idx"))
        if shard.is_chat:
            mask = path_of(folder, first, "mask")
            if mask.exists():
                mask.replace(f"{prefix}.mask")
            files["mask"] = _record(Path(f"{prefix}.mask"), shard.results[0].mask_sha256)
    if len(shard.held):
        save_array(folder / SHARDS / f"{name}.npy", shard.held)
        files["npy"] = _record(folder / SHARDS / f"{name}.npy")
    return Shard(
        name=name,
        external=shard.is_ready,
        part="validation" if first.validation else "both",
        documents=len(shard.lengths),
        tokens=int(shard.lengths.sum(dtype=np.int64)),
        held_out_documents=len(shard.held),
        held_out_tokens=int(shard.lengths[shard.held].sum(dtype=np.int64)),
        loss_tokens=shard.results[0].loss_tokens if shard.is_chat else None,
        files=files,
    )


def _place_tokens(folder: Path, shard: _Built, path: Path) -> str:
    """Move or join the jobs' tokens to a shard's .bin file; returns its SHA-256."""
    parts = [path_of(folder, job, "bin") for job in shard.jobs]
    if len(parts) == 1:
        if parts[0].exists():
            parts[0].replace(path)
        return shard.results[0].sha256
    return join(parts, path)


def _record(path: Path, digest: str | None = None) -> FileRecord:
    state = path.stat()
    if digest is None:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(bytes=state.st_size, sha256=digest, mtime_ns=state.st_mtime_ns)


def _prefix_name(folder: Path, job: Job) -> str:
    """Name of pre-tokenized data: that of their prefix, in the characters that names may have."""
    (unit,) = read_units(folder, job)
    name = Path(unit.file.location).name.removesuffix(".bin")
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("._-") or job.shard


def _free_name(name: str, taken: set[str]) -> str:
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    taken.add(free)
    return free


def _source_record(
    source: Source, contents: Contents, shards: tuple[Shard, ...], results: list[JobResult]
) -> SourceRecord:
    has_validation = any(shard.part == "validation" for shard in shards)
    if has_validation:
        shards = tuple(
            shard if shard.part == "validation" else shard.model_copy(update={"part": "train"})
            for shard in shards
        )
    blank = _skipped("blank", [result.blank for result in results])
    return SourceRecord(
        name=source.name,
        weight=source.weight,
        format=source.kind,
        text_key=source.text_key,
        files=len(source.files),
        bytes=source.size,
        characters=sum(result.characters for result in results),
        sha256=sources_sha256(source, contents),
        shards=shards,
        skipped=source.skipped + ((blank,) if blank else ()),
        bad_records=_skipped("damaged", [result.bad for result in results]),
    )


def _skipped(reason: str, rejected: Iterable[Rejected]) -> Skipped | None:
    """The records of all jobs that were not taken for one reason."""
    found = [one for one in rejected if one.count]
    if not found:
        return None
    return Skipped(
        reason=reason,
        count=sum(one.count for one in found),
        bytes=sum(one.bytes for one in found),
        first=found[0].first,
    )
