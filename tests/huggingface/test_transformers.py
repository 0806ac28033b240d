"""Exported models, computed by transformers, are the run's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from keel_megatron.architecture.residual import RULES, SubLayer
from keel_megatron.architecture.residual import alpha as alpha_of
from keel_megatron.checkpoint import manifest
from keel_megatron.checkpoint.folder import step_folder
from keel_megatron.cli.main import app
from keel_megatron.config.load import load_config
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.huggingface.configuration import to_json
from keel_megatron.huggingface.importing import import_folder
from keel_megatron.huggingface.naming import EXPORT, parameters
from keel_megatron.huggingface.tokenizer import DIFFICULT
from keel_megatron.inference import parity
from keel_megatron.inference.export import export_run
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.architecture.rules import GATED, HALF, added_rules
from tests.huggingface.models import disturb, exported_model, write_run
from tests.settings import small_config

parity.require_transformers()  # before anything imports it: sets its variables

MODELS: dict[str, dict[str, Any]] = {
    **{rule: {"residual": rule} for rule in RULES},
    "peri_ln": {"residual": "peri_ln", "embedding_norm": True},
    "keel v1, tied": {"first_block": "v1", "tie_embeddings": True},
    "no final norm": {"final_norm": False},
    "alpha 3": {"alpha": 3.0, "norm_epsilon": 1e-3, "rope_theta": 500.0},
    "complete_p of 3 blocks": {"residual": "complete_p", "base_blocks": 3},
    "Llama, tied": {"residual": "pre_ln", "tie_embeddings": True},
    "pre_ln without final norm": {"residual": "pre_ln", "final_norm": False},
    "pre_ln, QK-norm": {"residual": "pre_ln", "qk_norm": True},
    "keel, QK-norm": {"qk_norm": True},
}
COLUMNS = (
    "alpha",
    "branch_factor",
    "branch_norm",
    "inner",
    "inner_factor",
    "outer_norm",
    "head_norms",
    "streams",
)


def columns(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in COLUMNS}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_exported_code_has_every_rule_of_the_table(rule: str, qk_norm: bool) -> None:
    from keel_megatron.huggingface.remote.configuration_keel import KeelConfig, sub_layer

    assert set(COLUMNS) == set(SubLayer.__dataclass_fields__)
    for blocks in (1, 2, 3, 4, 5, 8, 13):
        for first_block in ("v1", "v2"):
            model = SimpleNamespace(
                residual=rule,
                blocks=blocks,
                alpha="auto",
                first_block=first_block,
                qk_norm=qk_norm,
                base_blocks=3,
                expansion_rate=2,
            )
            exported = KeelConfig(
                residual=rule,
                num_hidden_layers=blocks,
                first_block=first_block,
                base_blocks=3,
                expansion_rate=2,
                alpha=alpha_of(model),
                qk_norm=qk_norm,
            )
            for l in range(2 * blocks):
                row = EXPORT.sub_layer(l, model)
                assert columns(row) == columns(sub_layer(l, exported)), l


def test_a_rule_that_the_exported_code_does_not_know_is_refused() -> None:
    from keel_megatron.huggingface.remote.configuration_keel import KeelConfig

    with added_rules():
        config = small_config(model__residual=GATED)
        with pytest.raises(UserError, match="which an exported model does not support"):
            list(parameters(config.model, 512))
        for rule in (HALF, GATED):
            with pytest.raises(ValueError, match="is not a rule of this model's code"):
                KeelConfig(residual=rule)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_runs_own(name: str) -> None:
    from keel_megatron.model.language_model import build_model

    overrides = {f"model__{key}": value for key, value in MODELS[name].items()}
    config = small_config(
        **{"model__blocks": 5, "model__num_query_groups": 2, "data__seq_length": 24, **overrides}
    )
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(3))
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime)
        disturb(chunk)
        with torch.inference_mode():
            own = chunk.eval()(tokens, torch.arange(24)[None].expand(2, -1), None)
            weights = {key: value.detach() for key, value in chunk.named_parameters()}
            found = exported_model(weights, config)(tokens).logits
    result = parity.compare(own.flatten(0, 1), found.flatten(0, 1), 1e-5)
    assert result.holds, result.line()
    assert result.same_choice == 1.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    home = tmp_path_factory.mktemp("runs")
    write_run(home / "keel", sentencepiece_model)
    write_run(home / "llama", sentencepiece_model, model__residual="pre_ln")
    return home


@pytest.mark.parametrize("name", ["keel", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_command_exports_and_checks(name: str, dtype: str, runs: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "exported model.v1"
    arguments = ["export", str(runs / name), "--out", str(out), "--dtype", dtype]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "within the bound" in done.output
    assert "one model at a time" in done.output
    assert ("computed in bf16, they differ" in done.output) is (dtype == "bf16")
    is_keel = name == "keel"
    assert (out / "modeling_keel.py").exists() is is_keel
    assert ("trust_remote_code=True" in (out / "README.md").read_text()) is is_keel
    example = (out / "README.md").read_text().partition("```python")[2].partition("```")[0]
    exec(example.replace("50", "3"), {"FOLDER": str(out)})  # a program that the card shows
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=is_keel, dtype="auto")
    assert type(model).__name__ == ("KeelForCausalLM" if is_keel else "LlamaForCausalLM")
    types = {key.split(".")[-2]: value.dtype for key, value in model.named_parameters()}
    norms = torch.float32 if is_keel or dtype == "fp32" else torch.bfloat16
    assert types["norm"] == types["post_attention_layernorm"] == norms
    assert types["q_proj"] == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    own = open_tokenizer(runs / name / "checkpoints" / "step_00000000" / "tokenizer.model")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eod>", own.eod)
    for text in (*DIFFICULT, Path(argparse.__file__).read_text()):
        tokens = tokenizer(text)["input_ids"]
        assert tokens == own.encode(text), text[:40]
        assert tokenizer.decode(tokens) == own.decode(tokens) == text
    inputs = tokenizer(["def f", "class A:"], return_tensors="pt", padding=True)
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_a_failed_check_deletes_nothing_and_exits_with_1(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = to_json

    def wrong(*arguments: Any) -> dict[str, Any]:
        return {**write(*arguments), "alpha": 5.5}

    monkeypatch.setattr("keel_megatron.huggingface.export.to_json", wrong)
    arguments = ["export", str(runs / "keel"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "NOT within the bound 1e-05" in done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["alpha"] == 5.5
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_without_transformers_nothing_is_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    out, said = tmp_path / "out", list[str]()

    def export(check: bool) -> bool:
        return export_run(runs / "keel", out, step=None, dtype="fp32", check=check, say=said.append)

    with pytest.raises(UserError, match=r"pip install 'keel-megatron\[huggingface\]'"):
        export(True)
    assert not out.exists()
    assert export(False)
    assert (out / "model.safetensors").exists()
    assert not any("parity" in line for line in said)


def test_logits_that_are_not_finite_never_agree() -> None:
    own = torch.ones(3, 4)
    other = own.clone()
    other[1, 2] = float("nan")
    assert not parity.compare(own, other, 1.0).holds
    assert parity.compare(own, own.clone(), 0.0).holds


def test_a_run_of_other_kernels_is_checked_with_those_of_this_machine(
    sentencepiece_model: bytes, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", sentencepiece_model)
    path = step_folder(tmp_path / "run", 0)
    text = (path / "config.yaml").read_text().replace("precision: fp32", "precision: bf16")
    text = text.replace("backend: auto", "backend: transformer_engine").replace(
        "fp8: none", "fp8: hybrid"
    )
    (tmp_path / "run" / "config.yaml").write_text(text)
    files = manifest.read_manifest(path)
    files["config.yaml"] = manifest.write_checked(path / "config.yaml", [text.encode()])
    manifest.write_manifest(path, 0, files)
    said: list[str] = []
    assert export_run(
        tmp_path / "run", tmp_path / "out", step=None, dtype="fp32", check=True, say=said.append
    )
    assert "within the bound 1e-05" in said[-1]


@pytest.mark.parametrize("name", ["keel", "llama"])
def test_what_transformers_saves_is_imported(name: str, runs: Path, tmp_path: Path) -> None:
    """Another program's config.json, weights and tokenizer files; the same logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first, saved, run = tmp_path / "first", tmp_path / "saved", tmp_path / "run"
    export_run(runs / name, first, step=None, dtype="fp32", check=False, say=lambda _text: None)
    model = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    model.save_pretrained(saved, max_shard_size="200KB")
    AutoTokenizer.from_pretrained(first, trust_remote_code=True).save_pretrained(saved)
    assert len(list(saved.glob("*.safetensors"))) > 1
    import_folder(saved, run, lambda _text: None)
    config = load_config(run / "config.yaml")
    tokens = torch.arange(2, 26)[None]
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        own = parity.own_logits(step_folder(run, 0), config, runtime, tokens, torch.float32)
    with torch.inference_mode():
        found = model(tokens).logits[0]
    assert parity.compare(own, found, 1e-5).holds
    assert open_tokenizer(run / "tokenizer.json").encode("def f") == open_tokenizer(
        first / "tokenizer.model"
    ).encode("def f")
