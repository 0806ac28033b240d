"""config.json: a model's configuration in a Hugging Face folder, written and read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from keel_megatron.architecture.residual import RULES, SETTINGS, alpha
from keel_megatron.config.model import ModelConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.naming import is_llama

CONFIG: Final = "config.json"
REMOTE: Final = ("configuration_keel.py", "layers_keel.py", "modeling_keel.py")
"""The code of an exported model that is no Llama; transformers runs it with trust_remote_code."""
_AUTO_MAP = {
    "AutoConfig": "configuration_keel.KeelConfig",
    "AutoModel": "modeling_keel.KeelModel",
    "AutoModelForCausalLM": "modeling_keel.KeelForCausalLM",
}
_SIZES = {
    "blocks": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
}
"""Setting of the section `model` to field of config.json."""


def to_json(config: RunConfig, dtype: str, eod: int) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: the run.
        dtype: of the weights, float32 or bfloat16.
        eod: the token that ends a document.
    """
    model, llama = config.model, is_llama(config.model)
    rule = {} if llama else _rule(model)
    return {
        "model_type": "llama" if llama else "keel",
        "architectures": ["LlamaForCausalLM" if llama else "KeelForCausalLM"],
        **({} if llama else {"auto_map": _AUTO_MAP}),
        "dtype": dtype,
        "vocab_size": config.data.vocab_size,
        **{theirs: getattr(model, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        **rule,
        "max_position_embeddings": config.data.seq_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        **({"attention_bias": False, "mlp_bias": False} if llama else {}),
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
    }


def _rule(model: ModelConfig) -> dict[str, Any]:
    return {
        "residual": model.residual,
        "alpha": alpha(model),
        "first_block": model.first_block,
        "embedding_norm": model.embedding_norm,
        "base_blocks": model.base_blocks,
        "expansion_rate": model.expansion_rate,
        "final_norm": model.final_norm,
        "qk_norm": model.qk_norm,
    }


@dataclass(frozen=True)
class Found:
    """What a config.json says of a model."""

    model: dict[str, Any] = field(default_factory=dict)
    """Section `model` of a run."""
    vocab_size: Any = None
    seq_length: Any = None
    problems: tuple[str, ...] = ()
    """Fields that the project does not support, and why."""


def from_json(content: dict[str, Any]) -> Found:
    """A model from the content of config.json; its values are not checked otherwise.

    Args:
        content: of a Keel folder or of a Llama's; what other fields say is not used.
    """
    kind = content.get("model_type")
    if kind not in ("keel", "llama"):
        return Found(problems=(f"model_type: {kind!r} is not supported, only llama and keel are",))
    problems = [*_unsupported(content)]
    model = {ours: content.get(theirs) for ours, theirs in _SIZES.items()}
    model |= {
        "residual": "pre_ln",
        "norm_epsilon": content.get("rms_norm_eps", 1e-6 if kind == "llama" else 1e-5),
        "init_std": content.get("initializer_range", 0.02),
        "rope_theta": _rope(content).get("rope_theta", content.get("rope_theta", 10000.0)),
        "tie_embeddings": content.get("tie_word_embeddings", False),
    }
    if kind == "keel":
        model |= _from_rule(content, problems)
    missing = [theirs for ours, theirs in _SIZES.items() if ours != "num_query_groups"]
    missing = [name for name in (*missing, "vocab_size") if content.get(name) is None]
    problems += [f"{name}: is missing" for name in missing]
    return Found(
        model,
        content.get("vocab_size"),
        content.get("max_position_embeddings", 2048),
        tuple(problems),
    )


def _from_rule(content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The settings of a Keel folder that a Llama does not have."""
    rule = content.get("residual")
    if not isinstance(rule, str) or rule not in RULES:
        problems.append(f"residual: {rule!r} is not one of {', '.join(RULES)}")
        return {}
    found = {
        "residual": rule,
        "final_norm": content.get("final_norm", True),
        "qk_norm": content.get("qk_norm", False),
    }
    for name in ("first_block", "base_blocks", "embedding_norm", "expansion_rate"):
        if name in RULES[rule].settings:
            found[name] = content.get(name, SETTINGS[name])
    if "alpha" not in RULES[rule].settings:
        return found
    value, blocks = content.get("alpha"), content.get("num_hidden_layers")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.append(f"alpha: {value!r} is not a number")
    elif isinstance(blocks, int) and blocks > 0:
        # `auto` where it means the same, as in the run that was exported.
        try:
            automatic = float(2 * blocks) ** RULES[rule].alpha_exponent
            found["alpha"] = "auto" if value == automatic else float(value)
        except OverflowError:
            problems.append("alpha, num_hidden_layers: one of them is too large")
    return found


def _unsupported(content: dict[str, Any]) -> Iterator[str]:
    """Fields that change what the model computes in a way that the project does not compute."""
    rope = _rope(content)
    plain = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
    if any(value not in plain.get(key, ()) for key, value in rope.items() if key != "rope_theta"):
        name = "rope_parameters" if content.get("rope_parameters") else "rope_scaling"
        yield f"{name}: {rope} is not supported, only rope_type: default is"
    for name in ("attention_bias", "mlp_bias"):
        if content.get(name):
            yield f"{name}: biases are not supported"
    heads, hidden = content.get("num_attention_heads"), content.get("hidden_size")
    size, known = content.get("head_dim"), isinstance(heads, int) and isinstance(hidden, int)
    if size is not None and known and heads and size != hidden / heads:
        yield f"head_dim: {size} is not supported, only hidden_size / num_attention_heads is"
    if (activation := content.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act: {activation!r} is not supported, only silu (SwiGLU) is"
    if content.get("sliding_window") is not None:
        yield f"sliding_window: {content['sliding_window']} is not supported"
    layers = content.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        yield "layer_types: only full_attention is supported"
    for name, value in content.items():
        if "experts" in name and value:
            yield f"{name}: mixtures of experts are not supported"
    if content.get("quantization_config") is not None:
        yield "quantization_config: quantized weights are not supported"


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """The settings of the rotary embedding; rope_scaling before transformers 5."""
    found = content.get("rope_parameters") or content.get("rope_scaling") or {}
    return found if isinstance(found, dict) else {"rope_type": found}
