"""Small models: the run's, its exported twin, and run folders of random weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel_megatron.checkpoint.weights import Weight, write_weights
from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.configuration import to_json
from keel_megatron.huggingface.naming import is_llama, parameters
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.settings import small_config


def disturb(chunk: nn.Module) -> None:
    """Move norm weights, learned vectors and mixes, so that each has a value of its own."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if "streams" in name:
                parameter.add_(
                    0.1 * torch.rand(parameter.shape, generator=generator).to(parameter.device)
                )
            elif parameter.dim() == 1:
                parameter.mul_(
                    torch.rand(parameter.shape, generator=generator).to(parameter.device) + 0.5
                )


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


def write_run(folder: Path, tokenizer: bytes, **overrides: Any) -> RunConfig:
    """A run of random weights at step 0, as `keel import` would write it."""
    from keel_megatron.model.language_model import build_model

    config = small_config(
        **{
            "training__name": folder.name,
            "training__runs_dir": str(folder.parent),
            "model__blocks": 3,
            "model__num_query_groups": 2,
            **overrides,
        }
    )
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime, compute_dtype=torch.float32)
        disturb(chunk)
        weights = [
            Weight(name, tuple(value.shape), partial(torch.clone, value.detach()))
            for name, value in chunk.named_parameters()
        ]
        write_weights(folder, config, weights, {"tokenizer.model": tokenizer}, {})
    (folder / "config.yaml").write_text(dump_config(config))
    return config
