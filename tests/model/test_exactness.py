"""Every residual rule against the independent model of tests/reference_model.py.

Losses and all gradients, at 8 and at 256 sub-layers, in fp64 and in fp32. Errors are relative,
||g - g_ref|| / ||g_ref||: of the whole gradient and of every parameter's. In fp32 at 256 sub-layers
a few gains have gradients that nearly cancel, which the plain model itself misses by more than 1e-5
of its own fp64 run; of a single parameter we therefore ask to be within 1e-5 of the fp64 gradient,
or else no further from it than eight times what the plain fp32 model is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keel_megatron.architecture.residual import RULES
from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.reference_model import ReferenceModel, Shape
from tests.settings import small_config

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((rule, {}) for rule in RULES),
    ("keel", {"model__first_block": "v1"}),
    ("keel", {"model__final_norm": False}),
    ("keel", {"model__qk_norm": True, "training__z_loss": 1e-2}),
    ("mix_ln", {"model__qk_norm": True}),
]
"""Rules, and other settings."""


def shape_of(config: RunConfig) -> Shape:
    """The reference's shape for a run's model."""
    model = config.model
    return Shape(
        blocks=model.blocks,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        vocab_size=config.data.vocab_size,
        residual=model.residual,
        first_block=model.first_block,
        expansion_rate=model.expansion_rate,
        embedding_norm=model.embedding_norm,
        base_blocks=model.base_blocks,
        final_norm=model.final_norm,
        qk_norm=model.qk_norm,
        alpha=None if model.alpha == "auto" else float(model.alpha),
    )


def pair_up(package: nn.Module, reference: ReferenceModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, package's tensor as the reference arranges it, reference's parameter).

    Gives views of the package's parameters, so that copying and comparing share one mapping.
    """
    shape = reference.shape
    d, groups = shape.head_dim, shape.num_query_groups
    yield "embedding", package.embedding.word_embeddings.weight, reference.embedding
    yield "head", package.output_layer.weight, reference.head
    if shape.embedding_norm:
        yield "embedding_norm", package.embedding_norm.weight, reference.embedding_norm.gain
    if shape.final_norm:
        yield "final_norm", package.decoder.final_layernorm.weight, reference.final_norm.gain
    for number, layer in enumerate(package.decoder.layers):
        attention, ffn = reference.sub_layers[2 * number], reference.sub_layers[2 * number + 1]
        qkv = layer.self_attention.linear_qkv.weight.view(groups, -1, d, shape.hidden_size)
        at = f"blocks.{number}"
        yield f"{at}.wq", qkv[:, :-2].reshape(-1, shape.hidden_size), attention.F.wq
        yield f"{at}.wk", qkv[:, -2].reshape(-1, shape.hidden_size), attention.F.wk
        yield f"{at}.wv", qkv[:, -1].reshape(-1, shape.hidden_size), attention.F.wv
        yield f"{at}.wo", layer.self_attention.linear_proj.weight, attention.F.wo
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        yield f"{at}.w_gate", gate, ffn.F.w_gate
        yield f"{at}.w_up", up, ffn.F.w_up
        yield f"{at}.w_down", layer.mlp.linear_fc2.weight, ffn.F.w_down
        for slot, sub in (("attention_streams", attention), ("mlp_streams", ffn)):
            if hasattr(sub, "A_m"):
                n, mix = shape.expansion_rate, getattr(layer, slot).weight
                yield f"{at}.{slot}.A_m", mix[:n], sub.A_m
                yield f"{at}.{slot}.B", mix[n : 2 * n], sub.B
                yield f"{at}.{slot}.A_r", mix[2 * n :].view(n, n), sub.A_r
        for name, norm, where, key in norms(layer, attention, ffn):
            yield f"{at}.{name}", norm.weight, getattr(where, key)


def norms(layer: nn.Module, attention: nn.Module, ffn: nn.Module) -> Iterator[tuple]:
    """The norms and vectors that a block has, where each model keeps them."""
    for slot, sub in (("input_layernorm", attention), ("pre_mlp_layernorm", ffn)):
        if hasattr(sub, "N_in"):
            yield slot, getattr(layer, slot), sub.N_in, "gain"
        if hasattr(sub, "beta"):
            yield slot, getattr(layer, slot), sub, "beta"
    for slot, sub in (("attention_branch_norm", attention), ("mlp_branch_norm", ffn)):
        if hasattr(sub, "N_branch"):
            yield slot, getattr(layer, slot), sub.N_branch, "gain"
    # HybridNorm's N(Y) belongs to the FFN in its equation and to attention's sum in the layer.
    hybrid = attention.shape.residual == "hybrid_norm"
    if layer.attention_outer_norm is not None:
        owner = ffn if hybrid else attention
        yield "attention_outer_norm", layer.attention_outer_norm, owner.N_out, "gain"
    if layer.mlp_outer_norm is not None:
        yield "mlp_outer_norm", layer.mlp_outer_norm, ffn.N_out, "gain"
    for letter in "qkv":
        ours = getattr(layer.self_attention, f"{letter}_layernorm")
        if hasattr(attention.F, f"{letter}_norm"):
            yield f"{letter}_norm", ours, getattr(attention.F, f"{letter}_norm"), "gain"


def config_of(rule: str, blocks: int, **overrides: Any) -> RunConfig:
    return small_config(
        model__blocks=blocks,
        model__hidden_size=32,
        model__ffn_hidden_size=48,
        model__num_query_groups=2,
        model__residual=rule,
        model__embedding_norm="embedding_norm" in RULES[rule].settings,
        data__seq_length=16,
        data__vocab_size=320,
        **overrides,
    )


def errors(blocks: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """For every case the loss's relative error, the largest gradient's, and a sanity count."""
    from keel_megatron.runtime.distributed import start

    found = {}
    for rule, overrides in CASES:
        config = config_of(rule, blocks, **overrides)
        with start(config.parallel, config.training) as runtime:
            found[f"{rule} {overrides or ''}"] = compare(config, runtime, dtype)
    return found


def compare(config: RunConfig, runtime, dtype: torch.dtype) -> dict[str, float]:
    from keel_megatron.model.language_model import build_model

    (package,) = build_model(config, runtime, compute_dtype=dtype)
    reference = ReferenceModel(shape_of(config)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in package.named_parameters():
            if parameter.dim() == 1:  # gains of 1 would hide a gain that is not applied
                size = 0.02 if "streams" in name else 0.2  # mixes multiply over the depth
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        for _name, ours, theirs in pair_up(package, reference):
            assert ours.shape == theirs.shape
            theirs.copy_(ours)
    exact = copy.deepcopy(reference).double()
    rows = torch.randint(0, config.data.vocab_size, (2, 17), generator=generator)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    positions = torch.arange(16).expand(2, 16)
    loss = package(tokens, positions, None, labels=labels).mean()
    loss.backward()
    expected, trained = reference.losses(tokens, labels, config.training.z_loss)
    trained.backward()
    exact.losses(tokens, labels, config.training.z_loss)[1].backward()
    assert sum(p.numel() for p in package.parameters()) == sum(
        p.numel() for p in reference.parameters()
    ), "a parameter has no counterpart"
    for parameter in package.parameters():
        parameter.data = parameter.grad  # pair_up now maps gradients
    ours = [mine.double() for _name, mine, _theirs in pair_up(package, reference)]
    plain = [theirs.grad.double() for _name, _mine, theirs in pair_up(package, reference)]
    truth = [theirs.grad for _name, _mine, theirs in pair_up(package, exact)]
    return {
        "loss": abs(loss.item() / expected.item() - 1),
        "whole gradient": relative(
            torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in plain])
        ),
        "a parameter": max(map(relative, ours, plain)),
        "beyond rounding": max(
            relative(mine, true) / max(TOLERANCE[dtype], 8 * relative(theirs, true))
            for mine, theirs, true in zip(ours, plain, truth, strict=True)
        ),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("blocks", [4, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_gradients_agree(blocks: int, dtype: torch.dtype) -> None:
    found = run_ranks(1, errors, blocks, dtype)[0]
    assert len(found) == len(CASES)
    for case, error in found.items():
        numbers = "  ".join(f"{name} {value:.1e}" for name, value in error.items())
        print(f"{str(dtype)[6:]} {2 * blocks:4d} sub-layers {case:34} {numbers}")
        assert error["loss"] <= TOLERANCE[dtype], case
        assert error["whole gradient"] <= TOLERANCE[dtype], case
        assert error["beyond rounding"] <= 1.0, case
        if dtype == torch.float64:
            assert error["a parameter"] <= TOLERANCE[dtype], case
