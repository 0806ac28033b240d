"""The run's model and its exported twin in one process, without files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.configuration import to_json
from keel_megatron.huggingface.naming import is_llama, parameters


def disturb(chunk: nn.Module) -> None:
    """Move norm weights and learned vectors away from 1, so that each has a value of its own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)


def split_weights(weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """A run's weights under the names of a Hugging Face folder."""
    found: dict[str, Tensor] = {}
    for fused in parameters(config.model, config.data.vocab_size):
        weight = weights.pop(fused.name)
        assert tuple(weight.shape) == fused.shape, fused.name
        parts = dict(zip(fused.parts, fused.split(weight), strict=True))
        assert {name: tuple(part.shape) for name, part in parts.items()} == fused.parts
        assert torch.equal(fused.join(tuple(parts.values())), weight)
        found |= parts
    assert not weights, "parameters that are not exported"
    return found


def exported_model(weights: dict[str, Tensor], config: RunConfig) -> Any:
    """A model of transformers with these weights, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from keel_megatron.huggingface.remote.configuration_keel import KeelConfig
    from keel_megatron.huggingface.remote.modeling_keel import KeelForCausalLM

    content = to_json(config, "float32", 0)
    if is_llama(config.model):
        model: Any = LlamaForCausalLM(LlamaConfig(**content))
    else:
        model = KeelForCausalLM(KeelConfig(**content))
    missing, unexpected = model.load_state_dict(split_weights(weights, config), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.model.tie_embeddings else [])
    model.tie_weights()
    return model.eval()
