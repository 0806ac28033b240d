"""Prepared data: made once, complete or absent."""

from __future__ import annotations

import fcntl
import io
import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.corpus import find_corpus, split
from keel_megatron.data.prepare import PreparedData, prepare
from keel_megatron.data.tokenizer import Tokenizer
from tests.data.reuse import is_reused
from tests.distributed import CONTEXT
from tests.settings import small_config


def ignore(_text: str) -> None:
    pass


def test_the_indexed_tokens_are_the_texts(prepared: PreparedData, data_config: RunConfig) -> None:
    tokenizer = Tokenizer(prepared.tokenizer_path)
    for prefix, side in zip(
        (prepared.train_prefix, prepared.validation_prefix),
        split(find_corpus(data_config.data.text, ignore), data_config.data.validation_fraction),
        strict=True,
    ):
        indexed = IndexedDataset(str(prefix))
        texts = [document.text for document in side()]
        assert len(indexed) == len(texts)
        for row, text in zip(indexed, texts, strict=True):
            assert row[-1] == tokenizer.eod
            assert tokenizer.decode(row.tolist()) == text


def test_the_unigram_entropy_is_that_of_the_counts(prepared: PreparedData) -> None:
    """Against H = log n - (1/n) sum c log c, another way to write it."""
    tokens = [int(t) for row in IndexedDataset(str(prepared.train_prefix)) for t in row]
    counts = Counter(tokens)
    n = len(tokens)
    expected = math.log(n) - sum(c * math.log(c) for c in counts.values()) / n
    assert prepared.train_tokens == n
    assert prepared.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_a_second_time_it_is_reused(prepared: PreparedData, data_config: RunConfig) -> None:
    said: list[str] = []
    again = prepare(data_config, said.append)
    assert again.folder == prepared.folder
    assert said == [f"reusing the prepared data in {prepared.folder}"]


def test_three_processes_build_it_once(text: Path, tmp_path: Path) -> None:
    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path))
    with CONTEXT.Pool(3) as pool:
        found = pool.map(is_reused, [config] * 3)
    assert sorted(found) == [False, True, True]


@pytest.mark.parametrize("damage", ["shrunk", "gone"])
def test_damaged_data_is_made_anew(text: Path, tmp_path: Path, damage: str) -> None:
    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path))
    first = prepare(config, ignore)
    victim = first.folder / "train.bin"
    whole = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(whole[:100])
    said: list[str] = []
    assert not is_reused(config, said=said)
    assert victim.read_bytes() == whole
    assert "train.bin is missing or was changed" in said[0]


@pytest.mark.parametrize("manifest", ['{"fingerprint": "12', "{}", "null"])
def test_a_damaged_manifest_is_made_anew(text: Path, tmp_path: Path, manifest: str) -> None:
    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path))
    first = prepare(config, ignore)
    (first.folder / "data.json").write_text(manifest)
    said: list[str] = []
    assert not is_reused(config, said=said)
    assert "data.json was changed" in said[0]
    assert is_reused(config)


def test_a_failed_build_leaves_nothing_behind(text: Path, tmp_path: Path) -> None:
    config = small_config(
        data__text=str(text), data__cache_dir=str(tmp_path), data__vocab_size=1_000_000
    )
    with pytest.raises(UserError, match=r"data.vocab_size: 1000000 is too large"):
        prepare(config, ignore)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_half_built_folder_is_not_used(text: Path, tmp_path: Path) -> None:
    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path))
    first = prepare(config, ignore)
    (first.folder / "data.json").unlink()
    assert not is_reused(config)


def test_another_tokenizer_may_be_given(prepared: PreparedData, text: Path, tmp_path: Path) -> None:
    overrides = {"data__text": str(text), "data__cache_dir": str(tmp_path)}
    path = str(prepared.tokenizer_path)
    given = prepare(small_config(**overrides, data__tokenizer=path), ignore)
    assert given.tokenizer_path.read_bytes() == prepared.tokenizer_path.read_bytes()
    with pytest.raises(UserError, match=r"data.vocab_size: 640 must be 512"):
        prepare(small_config(**overrides, data__tokenizer=path, data__vocab_size=640), ignore)


def test_text_shorter_than_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("".join(f"{word} {word * 3}\n" for word in map(chr, range(97, 123))) * 4)
    config = small_config(
        data__text=str(path), data__cache_dir=str(tmp_path / "cache"), data__vocab_size=320
    )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"seq_length": 100_000})}
    )
    with pytest.raises(UserError, match=r"data.text: the training set has \d+ tokens, fewer"):
        prepare(config, ignore)


def test_a_cache_that_cannot_be_written(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data.cache_dir: cannot write .*Not a directory"):
        prepare(config, ignore)


def foreign(folder: Path, text: Path, **options: object) -> Path:
    """A tokenizer that a user has trained with SentencePiece's own defaults, but for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((text / "argparse.py").read_text().splitlines()),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 512, "minloglevel": 2, **options},
    )
    path = folder / "foreign.model"
    path.write_bytes(model.getvalue())
    return path


def test_a_tokenizer_that_loses_text_is_refused_unless_that_is_allowed(
    text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "data__text": str(text),
        "data__cache_dir": str(tmp_path / "cache"),
        "data__tokenizer": str(foreign(tmp_path, text)),
    }
    with pytest.raises(UserError) as caught:
        prepare(small_config(**options), ignore)
    message = str(caught.value)
    assert f"data.tokenizer: {tmp_path}/foreign.model loses 2" in message  # a fifth and more
    assert "it drops line ends or tabs; it merges white space" in message
    assert "no byte fallback" in message
    assert "set data.allow_lossy_tokenizer to true" in message
    assert "partial" not in message
    said: list[str] = []
    prepare(small_config(**options, data__allow_lossy_tokenizer=True), said.append)
    assert any(line.startswith("warning: data.tokenizer: ") for line in said)


def test_a_tokenizer_that_loses_nothing_is_taken_in_silence(text: Path, tmp_path: Path) -> None:
    whole = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    }
    options = {"data__text": str(text), "data__cache_dir": str(tmp_path / "cache")}
    given = str(foreign(tmp_path, text, **whole))
    said: list[str] = []
    prepare(small_config(**options, data__tokenizer=given), said.append)
    assert not any("data.tokenizer" in line for line in said)


def test_a_tokenizer_without_an_end_is_named(text: Path, tmp_path: Path) -> None:
    given = foreign(tmp_path, text, eos_id=-1)
    config = small_config(
        data__text=str(text), data__cache_dir=str(tmp_path / "cache"), data__tokenizer=str(given)
    )
    with pytest.raises(UserError, match=rf"data\.tokenizer: {given} has no end-of-sentence token"):
        prepare(config, ignore)


def test_a_log_that_fails_is_no_fault_of_the_cache(text: Path, tmp_path: Path) -> None:
    def closed(_text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path))
    assert prepare(config, closed).train_tokens > 0


def test_whoever_waits_for_another_says_so(text: Path, tmp_path: Path) -> None:
    config = small_config(data__text=str(text), data__cache_dir=str(tmp_path))
    folder = prepare(config, ignore).folder
    (folder / "data.json").unlink()
    said: list[str] = []
    with (tmp_path / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=prepare, args=(config, said.append))
        waiting.start()
        while not said:
            time.sleep(0.01)
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join()
    assert said[0] == f"waiting for another process that prepares {folder}"


def test_a_fraction_is_offered_only_where_it_changes_something(tmp_path: Path) -> None:
    words = "".join(f"{word} {word * 3}\n" for word in map(chr, range(97, 123))) * 4
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(words)
    config = small_config(
        data__text=str(tmp_path), data__cache_dir=str(tmp_path / ".cache"), data__vocab_size=320
    )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"seq_length": 100_000})}
    )
    with pytest.raises(UserError, match=r"a shorter data\.seq_length$"):
        prepare(config, ignore)
