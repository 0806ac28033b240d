"""The text on which an exported model is compared."""

from __future__ import annotations

from pathlib import Path

from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.inference.sample_text import sample_text
from tests.corpus.datasets import built, texts_of, write_texts
from tests.settings import small_config


def test_validation_text_is_used_where_the_runs_dataset_is_found(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text")
    folder = tmp_path / "dataset"
    size = {"data__vocab_size": 384}
    config = small_config(data__text=str(text), data__validation_fraction=0.2, **size)
    made = built(config.data, folder)
    config = small_config(data__dataset=str(folder), **size)
    tokenizer = open_tokenizer(folder / made.tokenizer.file)
    state = {"data": {"fingerprint": made.fingerprint}}
    found, what = sample_text(config, state, tokenizer)
    assert found == "\n".join(texts_of(folder)["validation"])
    assert what == f"the validation text of {folder}"
    standard = "a module of Python's standard library"
    for other in ({"data": {"fingerprint": "0" * 64}}, {"data": {}}, {}):
        assert sample_text(config, other, tokenizer)[1] == standard
    elsewhere = small_config(data__cache_dir=str(tmp_path / "none"), **size)
    assert sample_text(elsewhere, state, tokenizer)[1] == standard
