"""`keel data show` and `keel data sample`: what a dataset holds, and what the model sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from keel_megatron.data.dataset import Dataset
from keel_megatron.data.manifest import Manifest, Skipped
from keel_megatron.data.samples import Samples
from keel_megatron.data.sequences import Sequence
from keel_megatron.runtime.tables import count, table_lines


def describe(manifest: Manifest, folder: Path, weights: dict[str, float]) -> list[str]:
    """A dataset's sources, counts and tokenizer, as lines.

    Args:
        manifest: its manifest.
        folder: where it is.
        weights: of each source (`dataset.weights_of`).
    """
    total = sum(source.tokens("train") for source in manifest.sources)
    rows = [
        (
            source.name,
            source.format,
            f"{source.files:,}",
            _megabytes(source.bytes),
            f"{source.documents('train'):,}",
            f"{source.tokens('train'):,}",
            f"{source.documents('validation'):,}",
            f"{source.tokens('validation'):,}",
            f"{weights[source.name] / sum(weights.values()):.1%}",
        )
        for source in manifest.sources
    ]
    tokenizer = manifest.tokenizer
    origin = "given" if tokenizer.given else "trained on these sources"
    columns = ("source", "format", "files", "MB", "documents", "tokens")
    lines = [
        f"{folder}: fingerprint {manifest.fingerprint[:16]}",
        "",
        *table_lines(
            (*columns, "held-out documents", "held-out tokens", "share"), rows, left={0, 1}
        ),
        "",
        *_loss_tokens(manifest),
        f"{total:,} training tokens; unigram entropy {manifest.unigram_entropy:.3f} nats per token",
        f"tokenizer: {tokenizer.file}, {origin}, "
        f"{tokenizer.vocab_size:,} tokens, end of a document {tokenizer.eod}; encoded by "
        f"{tokenizer.encoder}; loses {tokenizer.lost:.2%} of the characters of a sample",
    ]
    for source in manifest.sources:
        lines += [f"{source.name}: skipped {_skipped(one)}" for one in source.skipped]
        if source.bad_records is not None:
            bad = source.bad_records
            records = f"{count(bad.count, 'damaged record')} ({bad.bytes:,} bytes)"
            lines.append(f"{source.name}: skipped {records}, such as {bad.first}")
        in_place = sum(shard.external for shard in source.shards)
        if in_place:
            pairs = count(in_place, "pair")
            lines.append(f"{source.name}: {pairs} of .bin and .idx used in place")
    return lines


def sample_lines(
    dataset: Dataset,
    samples: Samples,
    numbers: range,
    decode: Callable[[list[int]], str],
) -> Iterator[str]:
    """Samples as the model sees them, decoded document by document.

    Args:
        dataset: their dataset.
        samples: the run's samples.
        numbers: which of them.
        decode: the tokenizer's; it may leave out the end of a document, which is marked here.
    """
    for number in numbers:
        place, sequence = samples.locate(number), samples.read(number)
        assert sequence.tokens is not None
        source = samples.sources[place.source]
        yield (
            f"--- sample {number}: source {source.name}, sequence {place.sequence} of "
            f"{len(source)}, epoch {place.epoch + 1}; {source.seq_length} tokens"
        )
        tokens = sequence.tokens[:-1].tolist()  # the last one is only a label
        end = dataset.manifest.tokenizer.eod
        at = 0
        for length in sequence.lengths:
            piece = tokens[at : at + length]
            if at and piece:
                yield "<<< next document >>>"
            for counts, text in _spans(piece, at, sequence):
                if counts:
                    yield "<<< counts in the loss: >>>"
                yield decode([token for token in text if token != end])
                if counts:
                    yield "<<< until here >>>"
            at += length
            if piece and piece[-1] == end:
                yield "<<< end of document >>>"


def _spans(piece: list[int], at: int, sequence: Sequence) -> Iterator[tuple[bool, list[int]]]:
    """The tokens of a document that begins at `at`, cut where those begin or end that count.

    Without a loss mask all of them together, and not said to count.
    """
    if sequence.counts is None:
        yield False, piece
        return
    pairs = zip(sequence.counts[at : at + len(piece)].tolist(), piece, strict=True)
    for counts, group in groupby(pairs, key=itemgetter(0)):
        yield counts, [token for _, token in group]


def _loss_tokens(manifest: Manifest) -> Iterator[str]:
    """How many tokens of conversations count in the loss."""
    for source in manifest.sources:
        if source.is_chat:
            counted = sum(shard.loss_tokens or 0 for shard in source.shards)
            tokens = sum(shard.tokens for shard in source.shards)
            share = counted / max(1, tokens)
            yield f"{source.name}: {counted:,} of {tokens:,} tokens count in the loss ({share:.1%})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e5 else f"{size / 1e6:.2g}"


def _skipped(record: Skipped) -> str:
    return f"{record.count:,} ({record.bytes:,} bytes): {record.reason}, such as {record.first}"
