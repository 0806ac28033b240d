"""Datasets of conversations: the same tokens and masks whatever built them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel_megatron.corpus import plan, pool
from keel_megatron.corpus.build import identify
from keel_megatron.corpus.contents import fingerprint_of
from keel_megatron.data.chat.templates import DEFAULT, FILE
from keel_megatron.data.chat.tokens import open_chat
from keel_megatron.data.dataset import open_dataset
from keel_megatron.data.shards import TokenShard, map_mask
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.data.verify import verify
from keel_megatron.errors import UserError
from tests.corpus.datasets import built
from tests.corpus.files import data, ignore
from tests.corpus.tokenizers import prose, write_sentencepiece

Conversation = list[dict[str, str]]


def conversations(count: int) -> list[Conversation]:
    """Of one or two questions, with and without a system message."""
    found: list[Conversation] = []
    for number in range(count):
        messages = [{"role": "system", "content": prose(20, number)}] * (number % 3 == 0)
        for turn in range(1 + number % 2):
            messages.append({"role": "user", "content": prose(30 + number % 7, number + turn)})
            messages.append({"role": "assistant", "content": prose(10 + number % 50, number)})
        found.append(messages)
    return found


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def config(folder: Path, path: Path, **settings: Any) -> Any:
    source = {"path": str(path), "format": "chat", "name": "chat"}
    tokenizer = str(write_sentencepiece(folder))
    return data(sources=[source], tokenizer=tokenizer, vocab_size=400, **settings)


def content(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """All documents of a folder: their tokens, and which of them count."""
    tokens, counts = [], []
    dataset = open_dataset(folder, None)
    for placed in dataset.sources[0].shards:
        shard = TokenShard(placed.prefix)
        mask = map_mask(placed.path("mask"), len(shard.tokens))
        for number, length in enumerate(shard.lengths.tolist()):
            tokens.append(shard.read(number, 0, length).tolist())
            start = shard.place(number)
            counts.append(mask[start : start + length].tolist())
    return tokens, counts


def test_a_folder_has_the_tokens_masks_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = conversations(90)
    path = write_lines(tmp_path / "c.jsonl", [{"messages": m, "id": 7} for m in records])
    settings = config(tmp_path, path, validation_fraction=0.1)
    said: list[str] = []
    manifest = built(settings, tmp_path / "one", say=said.append)
    assert "chat template: the default; an answer ends with <eod>" in said
    folder = tmp_path / "one"
    assert (folder / FILE).read_text() == DEFAULT
    assert verify(open_dataset(folder, settings), ignore) == []

    tokens, counts = content(folder)
    with open_chat(open_tokenizer(folder / "tokenizer.model"), folder) as chat:
        encoded = [chat.encode(messages) for messages in records]
    assert tokens == [pair[0].tolist() for pair in encoded]
    assert counts == [pair[1].astype(int).tolist() for pair in encoded]
    (source,) = manifest.sources
    assert sum(shard.loss_tokens or 0 for shard in source.shards) == sum(map(sum, counts))

    monkeypatch.setattr(plan, "SMALLEST_JOB", 4000)
    monkeypatch.setattr(plan, "COST_OF_FILE", 0)
    monkeypatch.setattr(pool, "SMALL", 0)
    several = built(settings, tmp_path / "several", workers=2)
    assert len(several.sources[0].shards) > 2
    assert content(tmp_path / "several") == (tokens, counts)
    assert several.unigram_entropy == pytest.approx(manifest.unigram_entropy, rel=1e-12)

    held = np.load(folder / "shards" / "chat-00000.npy")
    assert 0 < len(held) < 30
    counted = np.concatenate(
        [
            np.array(t)[np.array(c) == 1]
            for n, (t, c) in enumerate(zip(tokens, counts, strict=True))
            if n not in held
        ]
    )
    shares = np.bincount(counted) / len(counted)
    shares = shares[shares > 0]
    assert manifest.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-9)


def test_one_of_few_is_held_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"messages": m} for m in conversations(3)])
    manifest = built(config(tmp_path, path, validation_fraction=1e-9), tmp_path / "set")
    assert manifest.sources[0].documents("validation") == 1
    assert np.isfinite(manifest.unigram_entropy)


def test_damaged_records(tmp_path: Path) -> None:
    good = [{"messages": m} for m in conversations(6)]
    bad = {"messages": [*conversations(1)[0], {"role": "user", "content": "a <eod> b"}]}
    path = write_lines(tmp_path / "c.jsonl", [*good, bad, {"messages": [{"role": "x"}]}])
    with pytest.raises(UserError) as error:
        built(config(tmp_path, path), tmp_path / "stopped")
    assert f"{path}, line 8: message 1 of 'messages' has the role 'x'" in str(error.value)
    settings = config(tmp_path, path, on_bad_record="skip")
    (source,) = built(settings, tmp_path / "skipped").sources
    assert source.bad_records is not None
    assert source.bad_records.count == 2
    first = f"{path}, line 7: message 4 contains '<eod>', the name of a special token"
    assert source.bad_records.first == first
    assert len(content(tmp_path / "skipped")[0]) == 6


def test_only_chat_depends_on_the_template(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"messages": m} for m in conversations(4)])
    template = tmp_path / "other.jinja"
    template.write_text(DEFAULT + "\n")
    chat = config(tmp_path, path, cache_dir=str(tmp_path / "cache"))
    other = chat.model_copy(update={"chat_template": template})
    assert identify(chat, ignore).fingerprint != identify(other, ignore).fingerprint
    assert identify(chat, ignore).fingerprint == identify(chat, ignore).fingerprint
    text = data(text=str(write_lines(tmp_path / "t.txt", ["a"])))
    # That of the version before conversations, of the same file.
    contents = {"text": {"t.txt": [4, "0" * 64]}}
    sources = identify(text.model_copy(update={"cache_dir": tmp_path / "cache"}), ignore).sources
    assert sources is not None
    changed = text.model_copy(update={"chat_template": template})
    assert fingerprint_of(text, sources, contents) == fingerprint_of(changed, sources, contents)
    assert fingerprint_of(text, sources, contents).startswith("45a1e4a0038d")


def test_a_template_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"messages": m} for m in conversations(4)])
    template = tmp_path / "bad.jinja"
    template.write_text("{% for %}")
    settings = config(tmp_path, path, chat_template=str(template))
    with pytest.raises(UserError, match=f"data.chat_template: {template} is not a template"):
        built(settings, tmp_path / "set")
