"""What programs that run the exported model's code need of it: vLLM, and older transformers."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keel_megatron.huggingface.configuration import to_json
from keel_megatron.inference import parity
from keel_megatron.inference.export import export_run
from tests.huggingface.models import disturb, write_run
from tests.settings import small_config

parity.require_transformers()  # before anything imports it: sets its variables

ROOT = Path(__file__).resolve().parents[3]
REMOTE = "keel_megatron.huggingface.remote"
TOKENS = torch.arange(2, 26)[None]


def overrides_of(rule: str) -> dict[str, Any]:
    """Of a residual rule, or of one with QK-norm: its name and " + QK-norm"."""
    name, _, norm = rule.partition(" + ")
    return {"model__residual": name, "model__qk_norm": bool(norm)}


def model_of(rule: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of random weights; norm weights are fp32, as from_pretrained keeps them."""
    from keel_megatron.huggingface.remote.configuration_keel import KeelConfig
    from keel_megatron.huggingface.remote.modeling_keel import KeelForCausalLM

    config = small_config(model__blocks=3, model__num_query_groups=2, **overrides_of(rule))
    torch.manual_seed(2)
    model = KeelForCausalLM(KeelConfig(**to_json(config, "float32", 0)))
    disturb(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype if parameter.dim() > 1 else torch.float32)
    return model.eval().requires_grad_(False)


def test_the_auto_classes_are_there() -> None:
    found = to_json(small_config(), "float32", 0)["auto_map"]
    assert set(found) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for name in found.values():
        module, _, kind = name.partition(".")
        assert hasattr(importlib.import_module(f"{REMOTE}.{module}"), kind)


@pytest.mark.parametrize("rule", ["keel", "hybrid_norm", "pre_ln + QK-norm"])
def test_the_plans_of_parallelism_name_what_is_there(rule: str) -> None:
    model = model_of(rule)
    assert model._supports_attention_backend
    plan = {"model." + key: kind for key, kind in model.config.base_model_tp_plan.items()}
    plan |= type(model)._tp_plan
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    for name in linear:
        assert sum(key == re.sub(r"\d+", "*", name) for key in plan) == 1, name
    assert {re.sub(r"\d+", "*", name) for name in linear} == set(plan)
    with_weights = [name for name, one in model.model.named_children() if list(one.parameters())]
    assert list(model.config.base_model_pp_plan) == with_weights


def test_keywords_reach_the_attention_function() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from keel_megatron.huggingface.remote.modeling_keel import eager_attention_forward

    model, calls = model_of("keel"), list[dict[str, Any]]()

    def attend(module: nn.Module, *args: Any, **keywords: Any) -> Any:
        calls.append({"layer": module.layer_idx, **keywords})
        return eager_attention_forward(module, *args, **keywords)

    ALL_ATTENTION_FUNCTIONS.register("recorded", attend)
    model.config._attn_implementation = "recorded"
    model.model(TOKENS, use_cache=False, marker=7)
    assert [call["layer"] for call in calls] == [0, 1, 2]
    assert all(call["marker"] == 7 for call in calls)
    assert all(call["scaling"] == model.config.head_dim**-0.5 for call in calls)


class OtherRMSNorm(nn.Module):
    """vLLM's: the result has the type of the input."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight, self.epsilon)
        return y.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["keel", "hybrid_norm", "pre_ln + QK-norm", "scaled_post_ln_beta"])
def test_norms_may_be_replaced(rule: str, dtype: torch.dtype) -> None:
    model = model_of(rule, dtype)
    expected, streams = model(TOKENS).logits, list[torch.dtype]()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "KeelRMSNorm":
                setattr(parent, name, OtherRMSNorm(child))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _given, out: streams.append(out.dtype))
    found = model(TOKENS).logits
    assert streams == [torch.float32] * 3
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert parity.compare(expected[0].float(), found[0].float(), bound).holds


PROGRAM = """\
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
inputs = tokenizer(["def f", "class Another:"], return_tensors="pt", padding=True)
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
with torch.inference_mode():
    logits = model(torch.arange(2, 26)[None]).logits[0, -1]
print(json.dumps([transformers.__version__, tokens.tolist(), logits.tolist()]))
"""


FUSERS = """\
import json, sys
from vllm.model_executor.models.transformers.fuser import get_fusers
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_config(config, trust_remote_code=True)
found = {type(m).__name__: [type(f).__name__ for f in get_fusers(m)] for m in model.modules()}
print(json.dumps({name: fusers for name, fusers in found.items() if name.startswith("Keel")}))
"""


@pytest.fixture
def vllm() -> Path:
    """Python of the environment of tools/serve_check.py, if it is there."""
    python = ROOT / "build" / "vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs the environment that tools/serve_check.py makes")
    return python


def exported(rule: str, tokenizer: bytes, home: Path) -> Path:
    write_run(home / "run", tokenizer, **overrides_of(rule))
    out = home / "out"
    export_run(home / "run", out, step=None, dtype="fp32", check=False, say=lambda _text: None)
    return out


def answer(python: Path, program: str, folder: Path) -> Any:
    """What a program prints last, as JSON."""
    done = subprocess.run([python, "-c", program, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["keel", "pre_ln", "pre_ln + QK-norm"])
def test_older_transformers_computes_the_same(
    rule: str, sentencepiece_model: bytes, tmp_path: Path, vllm: Path
) -> None:
    folder = exported(rule, sentencepiece_model, tmp_path)
    newest, mine, logits = answer(Path(sys.executable), PROGRAM, folder)
    version, tokens, other = answer(vllm, PROGRAM, folder)
    assert version != newest
    assert tokens == mine
    torch.testing.assert_close(torch.tensor(other), torch.tensor(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["keel", "hybrid_norm", "pre_ln + QK-norm"])
def test_vllm_merges_projections_and_knows_the_norms(
    rule: str, sentencepiece_model: bytes, tmp_path: Path, vllm: Path
) -> None:
    found = answer(vllm, FUSERS, exported(rule, sentencepiece_model, tmp_path))
    assert found["KeelAttention"][0] == "QKVFuser"
    assert "AttentionFuser" in found["KeelAttention"]
    assert found["KeelMLP"][0] == "GLUFuser"
    assert found["KeelRMSNorm"] == ["RMSNormFuser"]
    assert found["KeelDecoderLayer"] == []
