"""The content of a dataset folder does not depend on what built it."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from keel_megatron.corpus import plan, pool
from keel_megatron.corpus.build import build, identify
from keel_megatron.corpus.progress import BuildProgress
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from tests.corpus.datasets import built, digests, documents, texts_of, write_texts
from tests.corpus.files import data, ignore
from tests.corpus.tokenizers import bytes_bpe, prose, write_json, write_sentencepiece


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many jobs, done by worker processes, from little text."""
    monkeypatch.setattr(plan, "SMALLEST_JOB", 4000)
    monkeypatch.setattr(plan, "COST_OF_FILE", 0)
    monkeypatch.setattr(pool, "SMALL", 0)


def test_the_tokens_of_an_earlier_version(tmp_path: Path) -> None:
    """Those of data/prepare.py at 7f79c58 on the same files, with sentencepiece 0.2.3."""
    manifest = built(data(text=str(write_texts(tmp_path / "text")), vocab_size=380), tmp_path / "d")
    assert digests(tmp_path / "d") == {
        "train": "007dee9af0f42d1e",
        "validation": "e9981430fb3e66cd",
    }
    assert manifest.tokenizer.sha256.startswith("4bf783eaa7c0b24c")
    assert manifest.unigram_entropy == pytest.approx(3.6205288547419636, abs=1e-12)


def test_a_single_text_of_an_earlier_version(tmp_path: Path) -> None:
    """Those of data/prepare.py at 7f79c58 on the same file."""
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + prose(30_000))
    built(data(text=str(path), vocab_size=380, validation_fraction=0.1), tmp_path / "d")
    assert digests(tmp_path / "d") == {
        "train": "550c920d4e7bd570",
        "validation": "8ae6fbb20e33daa1",
    }


@pytest.mark.usefixtures("small_jobs")
def test_workers_give_the_tokens_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(tmp_path / "text")
    (folder / "large.txt").write_text(prose(30_000, 99))  # several parts
    records = [json.dumps({"text": prose(50 + n % 300, n)}) for n in range(300)]
    (tmp_path / "records.jsonl").write_text("\n".join(records))  # several ranges
    sources = [{"path": str(folder)}, {"path": str(tmp_path / "records.jsonl")}]
    config = data(sources=sources, tokenizer=str(write_sentencepiece(tmp_path)), vocab_size=400)
    two = built(config, tmp_path / "two", workers=2)
    assert len(two.sources[0].shards) > 5
    assert len(two.sources[1].shards) > 5
    monkeypatch.setattr(pool, "SMALL", 1 << 30)
    assert built(config, tmp_path / "one").model_dump(exclude={"sources"}) == two.model_dump(
        exclude={"sources"}
    )
    monkeypatch.setattr(plan, "SMALLEST_JOB", 1 << 20)
    whole = built(config, tmp_path / "whole")
    assert [len(source.shards) for source in whole.sources] == [1, 1]
    assert documents(tmp_path / "two") == documents(tmp_path / "one")
    assert documents(tmp_path / "two") == documents(tmp_path / "whole")
    assert whole.unigram_entropy == two.unigram_entropy
    texts = texts_of(tmp_path / "two")
    assert prose(30_000, 99) in texts["train"] + texts["validation"]
    assert len(texts["train"]) + len(texts["validation"]) == 331


@pytest.mark.usefixtures("small_jobs")
def test_a_large_single_line_is_shared_by_workers(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    text = prose(40_000).replace("\n", " ")
    path.write_text(text)
    said: list[str] = []
    config = data(text=str(path), tokenizer=str(write_sentencepiece(tmp_path)), vocab_size=400)
    built(config, tmp_path / "d", workers=2, say=said.append)
    assert not [line for line in said if "warning" in line]
    found, tokenizer = documents(tmp_path / "d"), open_tokenizer(tmp_path / "tokenizer.model")
    at = int(len(text) * 0.98)
    assert found["train"] == [[*tokenizer.encode(text[:at]), tokenizer.eod]]
    assert found["validation"] == [[*tokenizer.encode(text[at:]), tokenizer.eod]]


@pytest.mark.usefixtures("small_jobs")
def test_cuts_that_may_change_tokens_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("xy" * 10_000)
    tokenizer = write_json(tmp_path, bytes_bpe())
    said: list[str] = []
    config = data(text=str(path), tokenizer=str(tokenizer), vocab_size=326)
    built(config, tmp_path / "d", say=said.append)
    assert "".join(chain(*texts_of(tmp_path / "d").values())) == "xy" * 10_000
    assert [line for line in said if line.startswith("warning: long texts were cut at 4 places")]


def test_control_pieces_in_the_text_stay_text(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"<eod> {number}</s><|endoftext|>\n<unk><eod>")
    model, content = write_sentencepiece(tmp_path), write_json(tmp_path, bytes_bpe())
    for path, vocab_size in ((model, 400), (content, 326)):
        out = tmp_path / str(vocab_size)
        built(data(text=str(folder), tokenizer=str(path), vocab_size=vocab_size), out)
        texts = texts_of(out)  # also checks that `eod` ends documents only
        assert len(texts["train"]) == 2
        assert texts["train"][0].endswith("</s><|endoftext|>\n<unk><eod>")


def test_many_small_files_are_several_jobs(tmp_path: Path) -> None:
    jobs: list[plan.Job] = []

    def note(_partial: Path, planned: plan.Plan, _progress: BuildProgress) -> None:
        jobs.extend(planned.jobs)

    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(1500):
        (folder / f"{number}.txt").write_text("text")
    config = data(
        text=str(folder),
        tokenizer=str(write_sentencepiece(tmp_path)),
        vocab_size=400,
        cache_dir=str(tmp_path / "cache"),
    )
    build(config, identify(config, ignore), tmp_path / "d", ignore, note)
    assert [job.bytes for job in jobs] == [4 * 1023, 4 * 477]


def test_own_validation_files(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "text", 5)
    (tmp_path / "held.txt").write_text("held out")
    source = {"path": str(folder), "validation": str(tmp_path / "held.txt")}
    config = data(sources=[source], tokenizer=str(write_sentencepiece(tmp_path)), vocab_size=400)
    manifest = built(config, tmp_path / "d")
    assert [shard.part for shard in manifest.sources[0].shards] == ["train", "validation"]
    assert texts_of(tmp_path / "d")["validation"] == ["held out"]


@pytest.mark.parametrize("fraction", [1e-9, 0.499])
def test_of_few_records_one_is_held_out_and_one_is_not(tmp_path: Path, fraction: float) -> None:
    path = tmp_path / "a.jsonl"
    model = str(write_sentencepiece(tmp_path))
    seen = set()
    for start in range(6):
        path.write_text(
            "".join(json.dumps({"text": f"{start + n}"}) + " " * n + "\n" for n in (0, 1))
        )
        config = data(text=str(path), tokenizer=model, vocab_size=400, validation_fraction=fraction)
        out = tmp_path / f"{start}"
        manifest = built(config, out)
        texts = texts_of(out)
        assert [len(texts["train"]), len(texts["validation"])] == [1, 1]
        tokens = np.array(documents(out)["train"][0])
        counts = np.bincount(tokens) / len(tokens)
        counts = counts[counts > 0]
        assert manifest.unigram_entropy == pytest.approx(-(counts * np.log(counts)).sum())
        seen.add(texts["train"][0])
    assert len(seen) == 6


def test_one_record_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    config = data(text=str(path), tokenizer=str(write_sentencepiece(tmp_path)), vocab_size=400)
    with pytest.raises(UserError, match=r"data.text: .*a.jsonl has only one document"):
        built(config, tmp_path / "d")


def test_damaged_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n{"text": " "}\n{"text": "b"}\n')
    settings = {"text": str(path), "tokenizer": str(write_sentencepiece(tmp_path))}
    with pytest.raises(UserError, match=r"a.jsonl, line 2: 'text' is a number"):
        built(data(**settings, vocab_size=400), tmp_path / "d")
    said: list[str] = []
    config = data(**settings, vocab_size=400, on_bad_record="skip")
    manifest = built(config, tmp_path / "d", say=said.append)
    (source,) = manifest.sources
    assert source.bad_records is not None
    assert (source.bad_records.count, source.skipped[0].reason) == (1, "blank")
    assert any("skipped 1 damaged record, such as" in line and "line 2" in line for line in said)


def test_a_wrong_text_key_is_named_before_a_tokenizer_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one"}\n{"content": "two"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1: has no key 'text' .*'content'"):
        built(data(text=str(path)), tmp_path / "d")
    config = data(text=str(path), on_bad_record="skip")
    with pytest.raises(UserError, match=r"too small .*such as .*line 1: has no key 'text'"):
        built(config, tmp_path / "d")
    given = {"tokenizer": str(write_sentencepiece(tmp_path)), "vocab_size": 400}
    config = data(text=str(path), on_bad_record="skip", **given)
    with pytest.raises(
        UserError, match=r"there is no text in .*a.jsonl; skipped 2 damaged records"
    ):
        built(config, tmp_path / "e")


@pytest.mark.usefixtures("small_jobs")
def test_damaged_records_of_jobs_without_documents_are_counted(tmp_path: Path) -> None:
    good = [json.dumps({"text": prose(50, n)}) for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(good))
    (tmp_path / "b.jsonl").write_text('{"content": "..."}\n' * 500)
    config = data(
        text=str(tmp_path / "*.jsonl"),
        tokenizer=str(write_sentencepiece(tmp_path)),
        vocab_size=400,
        on_bad_record="skip",
    )
    (source,) = built(config, tmp_path / "d").sources
    assert source.bad_records is not None
    assert source.bad_records.count == 500
