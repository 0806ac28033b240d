"""Small source files, and what is read from them."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from keel_megatron.config.data import DataConfig
from keel_megatron.corpus.documents import Source, SourceFile
from keel_megatron.corpus.find import examine, list_files
from keel_megatron.corpus.readers import Tally, read, units
from keel_megatron.corpus.skips import printable


def ignore(_text: str) -> None:
    pass


def data(**settings: Any) -> DataConfig:
    return DataConfig.model_validate({"seq_length": 8, "vocab_size": 320, **settings})


def sources_of(config: DataConfig, said: list[str] | None = None) -> list[Source]:
    say = ignore if said is None else said.append
    return examine(list_files(config, say), say)


def found(*paths: Path, said: list[str] | None = None, **source: Any) -> Source:
    """The source of these paths: of `data.text`, or of an entry of `data.sources`."""
    path = [str(path) for path in paths]
    config = data(sources=[{"path": path, **source}]) if source else data(text=path)
    (one,) = sources_of(config, said)
    return one


def names(source: Source) -> list[str]:
    return [file.name for file in source.files]


def file_at(path: Path, **fields: Any) -> SourceFile:
    """A file as `examine` would describe it."""
    described = {"source": "s", "name": printable(path.name), "location": str(path)}
    return SourceFile(**described, size=path.stat().st_size, **fields)


def texts(file: SourceFile, size: int = 1 << 20, tally: Tally | None = None) -> dict[str, str]:
    """Text of all documents by key, read in units of about `size`."""
    documents: dict[str, str] = {}
    for unit in units(file, size):
        for document in read(unit, tally or Tally("stop")):
            documents[document.key] = documents.get(document.key, "") + "".join(document.chunks)
    return documents


def skipping(file: SourceFile, size: int = 1 << 20) -> tuple[list[str], Tally]:
    """Texts that are read when damaged records are skipped, and the count of those."""
    tally = Tally("skip")
    return list(texts(file, size, tally).values()), tally


def json_lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


COMPRESS = {"": bytes, "gzip": gzip.compress, "zstd": zstd}


def table(texts: list[Any], kind: Any = None) -> pyarrow.Table:
    column = pyarrow.array(texts, kind or pyarrow.string())
    return pyarrow.table({"id": list(range(len(texts))), "text": column})


def parquet(content: pyarrow.Table, rows: int = 1000, **settings: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(content, stream, row_group_size=rows, **settings)
    return stream.getvalue()


def arrow(content: pyarrow.Table, rows: int = 1000, *, is_file: bool = False) -> bytes:
    stream = io.BytesIO()
    new = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with new(stream, content.schema) as writer:
        writer.write_table(content, max_chunksize=rows)
    return stream.getvalue()


def saved_dataset(folder: Path, texts: list[str], parts: int = 2) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    step = -(-len(texts) // parts)
    listed = []
    for part in range(parts):
        name = f"data-{part:05d}-of-{parts:05d}.arrow"
        (folder / name).write_bytes(arrow(table(texts[part * step : (part + 1) * step])))
        listed.append({"filename": name})
    state = {"_data_files": listed, "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def indexed(prefix: Path) -> Path:
    """A pair that looks like Megatron-core's indexed tokens."""
    Path(f"{prefix}.bin").write_bytes(b"\0\1")
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\0\0" + b"\0" * 16)
    return prefix


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of Python objects that a call makes and holds at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
