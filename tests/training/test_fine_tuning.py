"""Supervised fine-tuning from another run's weights to an exported model that answers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import yaml
from keel_megatron.checkpoint import folder
from keel_megatron.cli.main import app
from keel_megatron.data.shards import TokenShard, map_mask
from keel_megatron.data.tokenizer import train_tokenizer
from keel_megatron.tracking.metrics import read_metrics
from tests.distributed import run_ranks
from tests.huggingface.models import write_run
from tests.integration.commands import losses_of
from tests.settings import settings
from tests.training.initialize_ranks import trained

SHAPE = {
    "model__blocks": 2,
    "model__hidden_size": 32,
    "model__ffn_hidden_size": 64,
    "model__num_query_groups": 2,
    "data__seq_length": 64,
}
STEPS = 8


def conversations() -> list[list[dict[str, str]]]:
    """Short ones of one or two turns, and one that is longer than a sequence."""
    found = []
    for number in range(40):
        system = [{"role": "system", "content": "Add."}] if number % 4 == 0 else []
        turns = [
            {"role": role, "content": content}
            for turn in range(1 + number % 2)
            for role, content in (("user", f"{number}+{turn}"), ("assistant", f"= {number + turn}"))
        ]
        found.append(system + turns)
    long = {"role": "assistant", "content": "one, two, three, " * 30}
    return [*found, [{"role": "user", "content": "Count."}, long]]


def write(home: Path, name: str, **overrides: Any) -> Path:
    """A fine-tuning run's YAML."""
    given = {
        **SHAPE,
        "training__name": name,
        "training__steps": STEPS,
        "training__global_batch_size": 4,
        "training__micro_batch_size": 1,  # validations leave no sequence out
        "training__validation_sequences": 100,
        "training__initialize_from": "runs/base",
        "checkpoint__every": STEPS // 2,
        "data__document_masks": True,
        "data__validation_fraction": 0.2,
        "data__tokenizer": "runs/base/checkpoints/step_00000000/tokenizer.model",
        "data__sources": [{"path": "chat.jsonl", "format": "chat", "name": "chat"}],
        **overrides,
    }
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(**given)))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, and a model fine-tuned from it in one process, then in two."""
    home = tmp_path_factory.mktemp("home")
    lines = [json.dumps({"messages": messages}) for messages in conversations()]
    (home / "chat.jsonl").write_text("\n".join(lines))
    text = "".join(f"{line}\n<|user|><|assistant|><|system|>\n" for line in lines)
    write_run(home / "runs" / "base", train_tokenizer([text], 350), data__vocab_size=350, **SHAPE)
    vocabulary = {"data__vocab_size": 350}
    one = write(home, "one", **vocabulary)
    two = write(home, "two", **vocabulary, parallel__pipeline=2)
    zero = {"training__engine": "deepspeed", "deepspeed__zero_stage": 3}
    others = [two, *([write(home, "zero", **vocabulary, **zero)] if has_deepspeed() else [])]
    assert run_ranks(1, trained, [one]) == [[None]]
    assert run_ranks(2, trained, others) == [[None] * len(others)] * 2
    return home


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def test_layouts_have_the_same_losses_and_a_resume_is_exact(home: Path) -> None:
    """Two stages, and two replicas of the other engine."""
    one, two = (losses_of(home / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == STEPS
    assert np.allclose([loss for _, loss, _ in one], [loss for _, loss, _ in two], rtol=1e-5)
    if has_deepspeed():
        zero = losses_of(home / "runs" / "zero" / "metrics.jsonl")
        assert np.allclose(one, zero, rtol=1e-5)
    assert one[-1][1] < one[0][1] - 0.1
    run = home / "runs" / "one"
    shutil.rmtree(folder.step_folder(run, STEPS))
    assert run_ranks(1, trained, [home / "one.yaml"]) == [[None]]
    assert losses_of(run / "metrics.jsonl") == one


def test_an_exported_model_has_the_template_the_tokens_and_the_loss(
    home: Path, tmp_path: Path
) -> None:
    """Of transformers alone, conversation by conversation, without packing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = home / "runs" / "one", tmp_path / "exported"
    done = CliRunner().invoke(app, ["export", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    (held,) = (home / "data").glob("*/shards/chat-00000.npy")
    shard = TokenShard(held.with_suffix(""))
    masks = map_mask(held.with_suffix(".mask"), len(shard.tokens))
    total, counted = 0.0, 0
    for number in np.load(held).tolist():
        found = tokenizer.apply_chat_template(
            conversations()[number], return_dict=True, return_assistant_tokens_mask=True
        )
        length, start = int(shard.lengths[number]), shard.place(number)
        assert found["input_ids"] == shard.read(number, 0, length).tolist()
        assert found["assistant_masks"] == masks[start : start + length].tolist()
        tokens = torch.tensor(found["input_ids"])
        mask = torch.tensor(found["assistant_masks"])[1:].bool()
        if len(tokens) > 65:
            continue
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total += float(losses[mask].sum())
        counted += int(mask.sum())
    assert counted > 20
    records = read_metrics(run / "metrics.jsonl")
    ours = next(r["validation_loss"] for r in reversed(records) if "validation_loss" in r)
    assert ours == pytest.approx(total / counted, rel=1e-5)


def test_it_answers(home: Path) -> None:
    run = home / "runs" / "one"
    arguments = ["generate", str(run), "--chat", "--temperature", "0", "--max-new-tokens", "20"]
    done = CliRunner().invoke(app, [*arguments, "--prompt", "3+1"])
    assert done.exit_code == 0, done.output
    assert "3+1" not in done.stdout
    refused = CliRunner().invoke(app, [*arguments, "--prompt", "<eod>"])
    assert "prompt 1: message 1 contains '<eod>', the name of a special token" in str(
        refused.exception
    )
    arguments[1] = str(home / "runs" / "base")
    refused = CliRunner().invoke(app, [*arguments, "--prompt", "3+1"])
    assert "--chat: the model has no chat template" in str(refused.exception)
