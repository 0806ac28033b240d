"""Ready Megatron-core tokens: counted, hashed, split and checked, but not copied."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from keel_megatron.corpus.plan import Job, Plan, read_units
from keel_megatron.corpus.split import ALL, key_hash
from keel_megatron.corpus.tokenize import Done, Extreme, JobResult, Report, path_of, save_array
from keel_megatron.data.shards import TokenShard, with_suffix
from keel_megatron.errors import UserError

_BLOCK = 1 << 22


def count_tokens(folder: Path, plan: Plan, job: Job, report: Report) -> JobResult:
    """Count the tokens of a prefix, and choose its held-out documents by their numbers.

    Raises:
        UserError: the files are damaged, or have tokens outside of the vocabulary.
    """
    (unit,) = read_units(folder, job)
    prefix = Path(unit.file.location.removesuffix(".bin"))
    shard = TokenShard(prefix)
    vocab_size = plan.tokenizer.vocab_size
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(shard.tokens), _BLOCK):
        block = np.asarray(shard.tokens[start : start + _BLOCK])
        if len(block) and (block.min() < 0 or block.max() >= vocab_size):
            raise UserError(
                f"{plan.sources[job.source].setting}: {prefix}.bin has the token "
                f"{max(block.max(), -int(block.min()))}, outside of the vocabulary of "
                f"{vocab_size}; set data.tokenizer to the tokenizer that encoded it"
            )
        counts += np.bincount(block.astype(np.int64), minlength=vocab_size)
        report(Done(bytes=block.nbytes, tokens=len(block)))
    _check_ends(shard, plan, job)
    limit = 0 if job.validation else plan.sources[job.source].limit
    hashes = _hashes(len(shard)) if limit else np.zeros(0, dtype=np.uint64)
    held = np.flatnonzero(hashes < np.uint64(min(limit, ALL - 1)))
    lengths = np.array(shard.lengths, dtype=np.int32)
    tokens = int(counts.sum())
    if job.validation:
        counts[:] = 0
    for document in held:
        counts -= token_counts(shard, int(document), vocab_size)
    for name, values in (("lengths", lengths), ("counts", counts), ("held", held)):
        save_array(path_of(folder, job, f"{name}.npy"), values)
    report(Done(documents=len(shard)))
    return JobResult(
        documents=len(shard),
        tokens=tokens,
        lowest=_extreme(hashes, lengths, int(hashes.argmin())) if len(hashes) else None,
        highest=_extreme(hashes, lengths, int(held[hashes[held].argmax()])) if len(held) else None,
        files={end: _record(with_suffix(prefix, end)) for end in ("bin", "idx")},
    )


def token_counts(shard: TokenShard, document: int, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each token occurs in a document."""
    tokens = shard.read(document, 0, int(shard.lengths[document]))
    return np.bincount(tokens.astype(np.int64), minlength=vocab_size)


def _check_ends(shard: TokenShard, plan: Plan, job: Job) -> None:
    """Check that documents end with the tokenizer's end of document."""
    last = shard.last_tokens()
    share = float((last == plan.tokenizer.eod).mean())
    if share < 0.5:
        raise UserError(
            f"{plan.sources[job.source].setting}: only {share:.1%} of the documents of "
            f"{shard.prefix} end with token {plan.tokenizer.eod}, the end-of-document token of "
            "data.tokenizer; use the tokenizer that encoded it, and prepare it with --append-eod"
        )


def _hashes(documents: int) -> np.ndarray:
    """uint64 [documents]: the split's hash of each document's number."""
    return np.fromiter((key_hash(str(n)) for n in range(documents)), np.uint64, documents)


def _extreme(hashes: np.ndarray, lengths: np.ndarray, document: int) -> Extreme:
    return Extreme(hash=int(hashes[document]), document=document, tokens=int(lengths[document]))


def _record(path: Path) -> dict[str, object]:
    state = path.stat()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": state.st_size, "sha256": digest, "mtime_ns": state.st_mtime_ns}
