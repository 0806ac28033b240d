"""The training text from which tokenizers are made."""

from __future__ import annotations

import json
from pathlib import Path

from keel_megatron.corpus.documents import Source
from keel_megatron.corpus.sample import Sampled, training_text
from keel_megatron.corpus.split import limit_of, split_offset
from tests.corpus.files import found


def sampled(source: Source, fraction: float = 0.2) -> Sampled:
    single = len(source.files) == 1 and source.kind == "text"
    stop = split_offset(source.files[0], fraction) if single else None
    return Sampled(source, limit_of(source, fraction), stop)


def texts(*sources: Sampled, budget: int, seed: int = 0) -> list[str]:
    return ["".join(chunks) for chunks in training_text(sources, budget, seed)]


def numbered(folder: Path, count: int, size: int = 100) -> list[str]:
    folder.mkdir()
    written = []
    for number in range(count):
        written.append(f"{folder.name} {number} ".ljust(size, "x"))
        (folder / f"{number:04}.txt").write_text(written[-1])
    return written


def test_all_training_documents_in_order_if_they_fit(tmp_path: Path) -> None:
    first, second = numbered(tmp_path / "one", 20), numbered(tmp_path / "two", 10)
    one, two = sampled(found(tmp_path / "one")), sampled(found(tmp_path / "two"))
    both = texts(one, two, budget=3000)
    assert both == [text for text in first + second if text in both]
    assert len(both) == 16 + 8


def test_a_sample_takes_from_every_source_by_its_bytes(tmp_path: Path) -> None:
    numbered(tmp_path / "one", 300)
    numbered(tmp_path / "two", 100)
    one, two = sampled(found(tmp_path / "one")), sampled(found(tmp_path / "two"))
    chosen = texts(one, two, budget=4000)
    assert chosen == texts(one, two, budget=4000)
    assert chosen != texts(one, two, budget=4000, seed=1)
    assert len(set(chosen)) == len(chosen)
    sizes = {name: sum(len(t) for t in chosen if t.startswith(name)) for name in ("one", "two")}
    assert sizes == {"one": 3000, "two": 1000}


def test_a_sample_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    numbered(tmp_path / "one", 300)
    item = sampled(found(tmp_path / "one"), 0.49)
    allowed = set(texts(item, budget=10**6))
    assert set(texts(item, budget=4000)) <= allowed


def test_records_and_single_texts_are_sampled(tmp_path: Path) -> None:
    records = [json.dumps({"text": f"record {n} " + "y" * 500}) for n in range(20_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    (tmp_path / "b.txt").write_text("".join(f"line {n} \u00e9\n" for n in range(800_000)))
    one, two = sampled(found(tmp_path / "a.jsonl")), sampled(found(tmp_path / "b.txt"))
    chosen = texts(one, two, budget=200_000)
    from_text = [text for text in chosen if "line" in text]
    assert 160_000 < sum(map(len, chosen)) <= 200_000
    assert len(from_text) > 2
    places = {int(text.split()[1]) // 2000 for text in chosen if text.startswith("record")}
    assert len(places) > 3
    last = (tmp_path / "b.txt").read_bytes()[: two.stop].count(b"\n")
    assert not any(f"line {n} " in text for text in from_text for n in range(last, last + 50))


def test_damaged_text_does_not_end_the_sample(tmp_path: Path) -> None:
    numbered(tmp_path / "one", 20)
    (tmp_path / "one" / "0000.txt").write_bytes(b"x" * 70_000 + b"\xff")
    assert len(texts(sampled(found(tmp_path / "one")), budget=10**6)) >= 15
