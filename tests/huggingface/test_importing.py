"""Hugging Face folders as runs: what comes in unchanged, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.weights import Weights
from keel_megatron.cli.main import app
from keel_megatron.config.load import load_config
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.huggingface.configuration import from_json
from keel_megatron.huggingface.folder import INDEX
from keel_megatron.huggingface.importing import import_folder
from keel_megatron.huggingface.tokenizer import tokenizer_files
from keel_megatron.inference.export import export_run
from tests.checkpoint.samples import Payload
from tests.huggingface.models import write_run

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


def llama_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    found = {"model.embed_tokens.weight": values(512, 32), "model.norm.weight": values(32)}
    found["lm_head.weight"] = values(512, 32)
    for block in (0, 1):
        at = f"model.layers.{block}"
        found |= {f"{at}.{n}_layernorm.weight": values(32) for n in ("input", "post_attention")}
        found |= {f"{at}.self_attn.{n}_proj.weight": values(32, 32) for n in "qo"}
        found |= {f"{at}.self_attn.{n}_proj.weight": values(16, 32) for n in "kv"}
        found |= {f"{at}.mlp.{n}_proj.weight": values(48, 32) for n in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = values(32, 48)
    return found


@pytest.fixture
def llama(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    """A Llama's folder as others write it: old field names, bf16, two files."""
    place = tmp_path / "llama"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "tokenizer.model").write_bytes(sentencepiece_model)
    weights = llama_weights()
    names = [sorted(weights)[::2], sorted(weights)[1::2]]
    for number, part in enumerate(names):
        save_file({name: weights[name] for name in part}, place / f"part-{number}.safetensors")
    weight_map = {name: f"part-{n}.safetensors" for n, part in enumerate(names) for name in part}
    (place / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return place


def imported(source: Path, run: Path) -> list[str]:
    said: list[str] = []
    import_folder(source, run, said.append)
    return said


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def named(overrides: dict[str, Any]) -> str:
    return ", ".join(f"{key.partition('__')[2]} {value}" for key, value in overrides.items())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model__first_block": "v1", "model__tie_embeddings": True, "model__alpha": 3.5},
        {"model__residual": "pre_ln", "model__rope_theta": 5e5, "training__precision": "bf16"},
        {"model__residual": "hybrid_norm", "model__final_norm": False, "data__seq_length": 48},
        {"model__residual": "deepnorm", "model__init_std": 0.01, "model__norm_epsilon": 1e-6},
        {"model__residual": "peri_ln", "model__embedding_norm": True},
        {"model__residual": "pre_ln", "model__qk_norm": True},
        {"model__residual": "layer_norm_scaling"},
        {"model__residual": "complete_p", "model__base_blocks": 1},
        {"model__residual": "hyper_connections", "model__expansion_rate": 3},
    ],
    ids=named,
)
def test_a_round_trip_changes_no_bit(
    overrides: dict[str, Any], tmp_path: Path, sentencepiece_model: bytes
) -> None:
    config = write_run(tmp_path / "run", sentencepiece_model, **overrides)
    for source, out in (("run", "first"), ("again", "second")):
        export_run(
            tmp_path / source,
            tmp_path / out,
            step=None,
            dtype="fp32",
            check=False,
            say=lambda _text: None,
        )
        if source == "run":
            imported(tmp_path / "first", tmp_path / "again")
    back = load_config(tmp_path / "again" / "config.yaml")
    assert back.model == config.model
    assert (back.data.vocab_size, back.data.seq_length) == (512, config.data.seq_length)
    shards = [
        folder.step_folder(tmp_path / run, 0) / manifest.shards_name(0) for run in ("run", "again")
    ]
    one, other = (tensors(path) for path in shards)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("model.safetensors", "tokenizer.model", "tokenizer.json", "config.json"):
        first, second = (tmp_path / out / name for out in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == sentencepiece_model


def test_a_llama_of_others_becomes_a_run(llama: Path, tmp_path: Path) -> None:
    weights = llama_weights()
    save_file(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, llama / "more.safetensors"
    )
    index = json.loads((llama / INDEX).read_text())
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "more.safetensors"
    (llama / INDEX).write_text(json.dumps(index))
    done = CliRunner().invoke(app, ["import", str(llama), "--out", str(tmp_path / "runs" / "a")])
    assert done.exit_code == 0, done.output
    assert "imported" in done.output
    assert "as pre_ln, 4 sub-layers" in done.output
    assert "optimizer.learning_rate=0.0001" in done.output
    assert f"training.initialize_from={tmp_path}/runs/a" in done.output.replace("\n", "")
    config = load_config(tmp_path / "runs" / "a" / "config.yaml")
    assert (config.model.norm_epsilon, config.model.rope_theta) == (1e-6, 500000.0)
    assert (config.model.query_groups, config.data.seq_length) == (2, 64)
    assert config.training.precision == "bf16"
    path = folder.step_folder(tmp_path / "runs" / "a", 0)
    manifest.check(path)
    read = Weights(path)
    qkv = read.read("decoder.layers.1.self_attention.linear_qkv.weight", (64, 32))
    at = "model.layers.1.self_attn"
    query, key, value = (weights[f"{at}.{n}_proj.weight"].float() for n in "qkv")
    assert torch.equal(qkv[:16], query[:16])  # the queries of the first of two groups
    assert torch.equal(qkv[16:24], key[:8])
    assert torch.equal(qkv[24:32], value[:8])
    assert torch.equal(qkv[32:48], query[16:])
    head = read.read("output_layer.weight", (512, 32))
    assert torch.equal(head, weights["lm_head.weight"].float())


def test_training_says_how_to_start_from_an_import(llama: Path, tmp_path: Path) -> None:
    from keel_megatron.training.startup import check

    imported(llama, tmp_path / "run")
    config = load_config(tmp_path / "run" / "config.yaml")
    with pytest.raises(UserError, match=rf"training\.initialize_from={tmp_path}/run"):
        check(config)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "linear scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        r"rope_scaling: .*linear.* only rope_type: default is",
    ),
    "llama3": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        r"rope_parameters: .*llama3",
    ),
    "attention bias": ({"attention_bias": True}, "attention_bias: biases are not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias: biases are not supported"),
    "head size": ({"head_dim": 16}, "head_dim: 16 is not supported"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
    "window": ({"sliding_window": 4096}, "sliding_window: 4096 is not supported"),
    "layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: only"),
    "experts": ({"num_local_experts": 8}, "num_local_experts: mixtures of experts"),
    "quantized": ({"quantization_config": {}}, "quantization_config: quantized"),
    "family": ({"model_type": "gpt2"}, "model_type: 'gpt2' is not supported"),
    "missing": ({"hidden_size": None}, "hidden_size: is missing"),
    "rule": ({"model_type": "keel", "residual": "gentle"}, "residual: 'gentle' is not one of keel"),
    "alpha": ({"model_type": "keel", "residual": "keel", "alpha": "big"}, "alpha: 'big' is not"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_computed_is_refused_by_name(name: str, llama: Path, tmp_path: Path) -> None:
    changes, message = UNSUPPORTED[name]
    (llama / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(UserError, match=message):
        imported(llama, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_reasons_are_given_at_once(llama: Path, tmp_path: Path) -> None:
    changes = {"attention_bias": True, "hidden_act": "relu", "num_attention_heads": 5}
    (llama / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(UserError, match=r"attention_bias(.|\n)*hidden_act(.|\n)*must divide"):
        imported(llama, tmp_path / "run")


def test_weights_that_do_not_fit_are_listed(llama: Path, tmp_path: Path) -> None:
    weights = llama_weights()
    weights["model.norm.weight"] = weights["model.norm.weight"][:16].clone()
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    del weights["model.layers.1.mlp.up_proj.weight"]
    (llama / INDEX).unlink()
    save_file(weights, llama / "model.safetensors")
    with pytest.raises(UserError) as caught:
        imported(llama, tmp_path / "run")
    for line in (
        "model.norm.weight: has the shape [16], not [32]",
        "lm_head.weight: is I8, not one of F32, BF16, F16",
        "model.layers.0.self_attn.q_proj.bias: is not supported",
        "model.layers.1.mlp.up_proj.weight: is missing",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_may_list_its_output_layer(llama: Path, tmp_path: Path, same: bool) -> None:
    (llama / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    weights = llama_weights()
    if same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    (llama / INDEX).unlink()
    save_file(weights, llama / "model.safetensors")
    if same:
        assert imported(llama, tmp_path / "run")
        return
    with pytest.raises(UserError, match=r"lm_head\.weight: is not supported"):
        imported(llama, tmp_path / "run")


@pytest.mark.security
def test_nothing_of_a_folder_is_run(llama: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = {**CONFIG, "auto_map": {"AutoConfig": "configuration_keel.KeelConfig"}}
    (llama / "config.json").write_text(json.dumps(content))
    for name in ("configuration_keel.py", "modeling_keel.py", "tokenization.py"):
        (llama / name).write_text(f"open({str(marker)!r}, 'w')\n")
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    assert imported(llama, tmp_path / "run")
    for path in [llama / INDEX, *llama.glob("*.safetensors")]:
        path.unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        imported(llama, tmp_path / "other")
    (llama / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        imported(llama, tmp_path / "other")
    assert not marker.exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.security
@pytest.mark.parametrize(
    "name", ["../part-0.safetensors", "/etc/passwd", "", 7, "..", ["x"], "a\0b"]
)
def test_an_index_names_no_file_elsewhere(name: Any, llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "part-0.safetensors", tmp_path)
    (llama / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match=r"which is not a file|cannot be read"):
        imported(llama, tmp_path / "run")


def test_a_tensor_in_two_files_is_refused(llama: Path, tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(32)}, llama / "part-x.safetensors")
    content = json.loads((llama / INDEX).read_text())
    content["weight_map"]["other"] = "part-x.safetensors"
    (llama / INDEX).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model\.norm\.weight is in part-\d.* and in part-x"):
        imported(llama, tmp_path / "run")


@pytest.mark.security
def test_numbers_of_any_size_are_refused_at_once(llama: Path, tmp_path: Path) -> None:
    keel = {"model_type": "keel", "residual": "keel"}
    for changes, message in (
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers: 1000000000000 for \d+ tensors"),
        ({**keel, "alpha": 4, "num_hidden_layers": 10**400}, "one of them is too large"),
        ({**keel, "alpha": 10**400}, "one of them is too large"),
        ({**keel, "residual": ["keel"]}, r"residual: \['keel'\] is not one of"),
        ({"hidden_size": "32", "head_dim": 8}, "hidden_size"),
    ):
        (llama / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        with pytest.raises(UserError, match=message):
            imported(llama, tmp_path / "run")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"model_type": ["llama"]}'])
def test_a_configuration_that_is_none(text: str, llama: Path, tmp_path: Path) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"is not JSON|not a JSON object|model_type"):
        imported(llama, tmp_path / "run")


@pytest.mark.parametrize(
    "field",
    [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"),
        *("max_position_embeddings", "head_dim", "rope_parameters", "dtype", "layer_types"),
    ],
)
def test_a_value_of_another_kind_is_no_traceback(field: str, llama: Path, tmp_path: Path) -> None:
    content = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    harmless = {"tie_word_embeddings", "dtype", "layer_types"}
    for value in ("x", -1, 1e400, [3], {"a": {}}, True):
        (llama / "config.json").write_text(json.dumps({**content, field: value}))
        with suppress(UserError):
            imported(llama, tmp_path / f"run-{value!s:.1}")
            assert field in harmless, f"{value} was accepted"


def test_alpha_and_first_block_of_rules_that_have_none_are_ignored() -> None:
    content = {**CONFIG, "model_type": "keel", "residual": "post_ln", "alpha": 4.0}
    found = from_json({**content, "first_block": "v1"})
    assert found.problems == ()
    assert "alpha" not in found.model
    assert "first_block" not in found.model
    assert from_json({**content, "residual": "keel"}).model["alpha"] == "auto"
    assert from_json({**content, "residual": "keel", "alpha": 5}).model["alpha"] == 5.0


def test_a_tokenizer_json_goes_through(llama: Path, tmp_path: Path) -> None:
    files = tokenizer_files(open_tokenizer(llama / "tokenizer.model"), 64).content
    (llama / "tokenizer.model").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).write_bytes(files[name])
    imported(llama, tmp_path / "run")
    checkpoint = folder.step_folder(tmp_path / "run", 0)
    for place in (tmp_path / "run", checkpoint):
        assert not (place / "tokenizer.model").exists()
        assert (place / "tokenizer.json").is_file()
    manifest.check(checkpoint)
    options: dict[str, Any] = {"step": None, "dtype": "fp32", "check": False}
    export_run(tmp_path / "run", tmp_path / "out", say=lambda _text: None, **options)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(files[name])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    with pytest.raises(UserError, match=r"there is no tokenizer\.json or tokenizer\.model"):
        imported(llama, tmp_path / "other")
