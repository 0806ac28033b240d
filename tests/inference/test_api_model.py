"""`keel.load_model`: a model in the calling process."""

from __future__ import annotations

from pathlib import Path

import pytest

import keel_megatron as keel
from tests.huggingface.models import write_run
from tests.settings import settings


def test_one_model_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentencepiece_model: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "keel"
    write_run(run, sentencepiece_model, model__init_std=0.1)
    with keel.load_model(str(run)) as model:
        for call in (
            lambda: keel.load_model(run),
            lambda: keel.train(keel.load_config(settings())),
        ):
            with pytest.raises(keel.UserError, match="this process already holds a model"):
                call()
        alone = model.generate("def f", max_new_tokens=4)
        both = model.generate("def f", "class", max_new_tokens=4)
        assert both[:1] == alone
        tokens = model.tokenizer.encode("def f")
        assert bool((model.logits("def f") == model.logits(tokens)).all())
        (greedy,) = model.generate("def f", max_new_tokens=1, temperature=0)
        chosen = int(model.logits(tokens)[-1].argmax())
        assert greedy.text == model.tokenizer.decode([*tokens, chosen])[len("def f") :]
        with pytest.raises(keel.UserError, match="must be from 1 to the context, 32"):
            model.logits([])
        for token in (-1, model.config.data.vocab_size):
            with pytest.raises(keel.UserError, match=f"logits: token {token} must be from 0 to "):
                model.logits([1, token])
        with pytest.raises(keel.UserError, match="--temperature: -1 must be"):
            model.generate("x", temperature=-1)
        with pytest.raises(keel.UserError, match="--batch-size: 0 must be at least 1"):
            model.generate("x", batch_size=0)
        with pytest.raises(keel.UserError, match="--text: "):
            model.perplexity(tmp_path / "nowhere")
    with pytest.raises(keel.UserError, match="is closed; load it again"):
        model.generate("x")
    with keel.load_model(run / "checkpoints" / "step_00000000") as model:
        assert model.step == 0
