"""Speed and memory of `keel data build`, by format, on generated corpora.

python tools/bench/data.py [--size MB] [--line MB] [--files N] [--workers 1 2] [--formats ...]

Generates English-like text in each format, builds a dataset of it with a given SentencePiece
tokenizer of 32,000 pieces, and writes docs/benchmarks/data.md. Every build of the same text must
give the same tokens.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "benchmarks" / "data.md"
FORMATS = ("text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "line", "files")
VOCABULARY = 32_000
_SYLLABLES = "ba be ca con da der di en er fa for ga in is la li ma men ne or pa per ra re ri sa se"
_ROW_GROUP = 2000


class English:
    """English-like text: phrases of Python's reference, and invented words by Zipf's law.

    Args:
        seed: of the text.
    """

    def __init__(self, seed: int) -> None:
        from pydoc_data.topics import topics

        self._numbers = np.random.default_rng(seed)
        words = re.findall(r"[A-Za-z][a-z']*[,.;:]?", " ".join(topics.values()))
        spans = self._numbers.integers(1, 6, 60_000)
        starts = self._numbers.integers(0, len(words) - 6, 60_000)
        phrases = [" ".join(words[a : a + n]) for a, n in zip(starts, spans, strict=True)]
        syllables = _SYLLABLES.split()
        invented = [
            "".join(self._numbers.choice(syllables, self._numbers.integers(2, 5)))
            for _ in range(60_000)
        ]
        self._phrases = np.array([*phrases, *invented, "\n", "\n\n"], dtype=object)
        ranks = np.arange(1, 60_001)
        weights = np.concatenate([np.ones(60_000) / 60_000, 0.6 / ranks / 11.6, [0.05, 0.02]])
        self._ends = np.cumsum(weights / weights.sum())

    def text(self, characters: int) -> str:
        """About so many characters."""
        chosen = np.searchsorted(self._ends, self._numbers.random(max(1, characters // 13)))
        return " ".join(self._phrases[np.minimum(chosen, len(self._phrases) - 1)])

    def documents(self, size: int) -> Iterator[str]:
        """Documents of about 3,000 characters, `size` bytes in all."""
        while size > 0:
            lengths = self._numbers.lognormal(7.5, 1.0, 100).astype(int) + 50
            block = self.text(int(lengths.sum()))
            start = 0
            for length in lengths:
                document = block[start : start + length]
                start += length
                if document.strip():
                    size -= len(document)
                    yield document


def generate(form: str, folder: Path, size: int, line: int, files: int) -> Path:
    """Write a corpus; returns its path."""
    english = English(1)
    path = folder / f"corpus.{form}"
    if form == "text":
        path = folder / "corpus.txt"
        with path.open("w") as stream:
            for document in english.documents(size):
                stream.write(document + "\n")
    elif form == "line":
        path = folder / "line.txt"
        with path.open("w") as stream:
            for document in english.documents(line):
                stream.write(document.replace("\n", " "))
    elif form == "files":
        path = folder / "files"
        for number, document in enumerate(english.documents(files * 3500)):
            if number == files:
                break
            part = path / f"{number // 1000:05}"
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{number:07}.txt").write_text(document[:400])
    elif form == "parquet":
        _parquet(path, english.documents(size))
    else:
        with _opened(path, form) as stream:
            for document in english.documents(size):
                stream.write(json.dumps({"text": document}).encode() + b"\n")
    return path


def _opened(path: Path, form: str):
    if form.endswith(".gz"):
        return gzip.open(path, "wb", compresslevel=1)
    if form.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "wb")
    return path.open("wb")


def _parquet(path: Path, documents: Iterator[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        rows: list[str] = []
        for document in documents:
            rows.append(document)
            if len(rows) == _ROW_GROUP:
                writer.write_table(pyarrow.table({"text": rows}, schema=schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.table({"text": rows}, schema=schema))


@dataclass
class Row:
    """One build."""

    form: str
    workers: int
    bytes: int
    characters: int
    documents: int
    tokens: int
    seconds: float
    worker_memory: int
    memory: int
    encoder: str
    sha256: str


def measure(corpus: Path, form: str, workers: int, folder: Path, model: Path) -> Row:
    """Build a dataset from a corpus."""
    out = folder / "dataset"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    config = yaml.safe_load((ROOT / "yaml" / "demo.yaml").read_text())
    config["data"] |= {
        "text": str(corpus),
        "tokenizer": str(model),
        "vocab_size": VOCABULARY,
        "cache_dir": str(folder / "cache"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "keel_megatron", "data", "build", str(folder / "run.yaml")]
    command += ["--out", str(out), "--workers", str(workers)]
    started = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    seconds = time.monotonic() - started
    manifest = json.loads((out / "data.json").read_text())
    (source,) = manifest["sources"]
    log = (out / "build.log").read_text()
    (memory,) = re.findall(r"memory of a worker ([\d,]+) MB, of this process ([\d,]+) MB", log)
    digest = hashlib.sha256()
    for shard in source["shards"]:
        digest.update((out / "shards" / f"{shard['name']}.bin").read_bytes())
    return Row(
        form,
        workers,
        source["bytes"],
        source["characters"],
        sum(shard["documents"] for shard in source["shards"]),
        sum(shard["tokens"] for shard in source["shards"]),
        seconds,
        int(memory[0].replace(",", "")),
        int(memory[1].replace(",", "")),
        manifest["tokenizer"]["encoder"],
        digest.hexdigest(),
    )


def report(rows: list[Row], arguments: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# Building datasets",
        "",
        "`keel data build` on generated English-like text, with a given SentencePiece tokenizer of",
        f"{VOCABULARY:,} pieces. The time is that of the whole command: start, listing, hashing,",
        "choice of an encoder, tokenizing, writing. MB is the size of the source files as stored,",
        "M characters that of their text. Memory is the peak of the largest worker, and of the",
        "main process, which starts the workers. The tool checks that rows of the same text have",
        "the same tokens.",
        "",
        f"`python tools/bench/data.py --size {arguments.size} --line {arguments.line} --files "
        f"{arguments.files}`, {date.today()}, {os.cpu_count()} cores of a shared "
        f"{platform.machine()} machine. Encoder: {rows[0].encoder}. " + arguments.note,
        "",
        "| format | workers | MB | M characters | documents | M tokens | s | MB/s | M tokens/s | "
        "worker MB | main MB |",
        "|---|-:|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.form} | {row.workers} | {row.bytes / 1e6:,.0f} | {row.characters / 1e6:,.0f} "
            f"| {row.documents:,} | {row.tokens / 1e6:,.1f} | {row.seconds:,.1f} "
            f"| {row.bytes / row.seconds / 1e6:,.1f} | {row.tokens / row.seconds / 1e6:,.2f} "
            f"| {row.worker_memory:,} | {row.memory:,} |"
        )
    lines += [
        "",
        "text: one file. line: a file of one line. files: small text files. A compressed file",
        "is read by one worker.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1000, help="MB of text, most formats")
    parser.add_argument("--line", type=int, default=200, help="MB of the single line")
    parser.add_argument("--files", type=int, default=200_000, help="number of small files")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--folder", type=Path, help="for the corpora; default: a temporary one")
    parser.add_argument("--note", default="", help="added to the page, such as the load")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    from keel_megatron.data.tokenizer import train_tokenizer

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        model = folder / "tokenizer.model"
        model.write_bytes(train_tokenizer(English(0).documents(8_000_000), VOCABULARY))
        for form in arguments.formats:
            corpus = generate(
                form, folder, arguments.size * 10**6, arguments.line * 10**6, arguments.files
            )
            own = [measure(corpus, form, n, folder, model) for n in arguments.workers]
            if len({row.sha256 for row in own}) > 1:
                sys.exit(f"{form}: other tokens with another number of workers")
            rows += own
            if corpus.is_dir():
                shutil.rmtree(corpus)
            else:
                corpus.unlink()
            arguments.page.write_text(report(rows, arguments))
    print(report(rows, arguments))


if __name__ == "__main__":
    main()
