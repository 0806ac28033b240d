"""Gradient flow through the stack at initialization, measured and predicted.

The paper (arXiv 2601.19895, section 3) analyses the skip path: the product of the Jacobians of
x_{l+1} = N_out(alpha x_l + c F_l) with constant F_l. With all norm weights at 1 and branches of RMS
1, each is (c = 1 in the paper's rules)

    |J_l| = alpha / sqrt(alpha^2 + c^2),

so a stack of L sub-layers keeps (1 + 1/alpha^2)^(-L/2): about 1 for Keel (alpha = L), 2^(-L/2) for
Post-LN (alpha = 1), exp(-sqrt(L)/2) for DeepNorm (alpha = L^1/4). The analysis neglects
the norm's projection, which removes one of h directions, and changes of norm weights in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keel_megatron.architecture.residual import Reader
from keel_megatron.config.load import parse_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start

ANALYSIS = Reader(
    "the study of gradient flow",
    # A fixed branch has any inside.
    (
        "alpha",
        "branch_factor",
        "branch_norm",
        "inner",
        "inner_factor",
        "outer_norm",
        "head_norms",
        "streams",
    ),
)
FIRST = 2
"""The analysis starts after the first block: Keel's has fewer norms, and x_0 is the embedding."""
_SEQUENCE, _VOCABULARY = 32, 512
_PAPER_HIDDEN_SIZE, _PAPER_INIT_STD = 1024, 0.02


@dataclass(frozen=True)
class GradientFlow:
    """Results of one model, as lists over l = FIRST .. L."""

    residual: str
    sub_layers: int
    skip: list[float]
    """Measured |d x_L / d x_l| along the skip path, branches scaled to an RMS of 1."""
    predicted: list[float]
    """The same, predicted by the analysis."""
    loss: list[float]
    """Measured |d loss / d x_l| / |d loss / d x_L|, with unscaled branches."""


def gradient_flow(residual: str, sub_layers: int, hidden_size: int = 128) -> GradientFlow:
    """Measure an initialized model, in fp64, in this process.

    Weights are N(0, 0.02^2 x 1024 / h), so that a narrow model's matrices scale their inputs as
    those of the paper's width. The terms neglected by the analysis are of order 1/h.

    Args:
        residual: a rule of architecture/residual.py with an outer norm in every sub-layer.
        sub_layers: L, even.
        hidden_size: width; a multiple of 16.

    Raises:
        UserError: the depth is odd, or the rule has a sub-layer without an outer norm.
        ConfigError: the rule or the sizes are invalid.
    """
    if sub_layers % 2:
        raise UserError(f"sub-layers: {sub_layers} must be even, two per block")
    config = _config(residual, sub_layers, hidden_size)
    rules = [ANALYSIS.sub_layer(l, config.model) for l in range(FIRST, sub_layers)]
    if not all(rule.outer_norm for rule in rules):
        raise UserError(
            f"residual: {residual} has sub-layers without an outer norm; the analysis is of "
            "x_{l+1} = N_out(alpha x_l + c F_l)"
        )
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime, compute_dtype=torch.float64)
        streams: list[Tensor] = []
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            layer.observer = lambda _l, _x, _branch, _alpha, x_new: streams.append(x_new)
        loss = _loss(chunk, config)
        whole = torch.autograd.grad(loss, streams[FIRST - 1 :])
        _fix_branches(chunk)
        streams.clear()
        _loss(chunk, config)
        down = torch.randn(streams[-1].shape, dtype=torch.float64, generator=_generator(2))
        skip = torch.autograd.grad(streams[-1], streams[FIRST - 1 :], down)
    return GradientFlow(
        residual,
        sub_layers,
        skip=[(gradient.norm() / down.norm()).item() for gradient in skip],
        predicted=[predicted_skip(config, l) for l in range(FIRST, sub_layers + 1)],
        loss=[(gradient.norm() / whole[-1].norm()).item() for gradient in whole],
    )


def predicted_skip(config: RunConfig, l: int) -> float:
    """Predicted |d x_L / d x_l| along the skip path: the product of all |J_l|."""
    model = config.model
    rules = (ANALYSIS.sub_layer(number, model) for number in range(l, model.sub_layers))
    return math.prod(rule.alpha / math.hypot(rule.alpha, rule.branch_factor) for rule in rules)


def _config(residual: str, sub_layers: int, hidden_size: int) -> RunConfig:
    return parse_config(
        {
            "model": {
                "blocks": sub_layers // 2,
                "hidden_size": hidden_size,
                "ffn_hidden_size": 3 * hidden_size,
                "num_attention_heads": hidden_size // 16,
                "residual": residual,
                "init_std": _PAPER_INIT_STD * math.sqrt(_PAPER_HIDDEN_SIZE / hidden_size),
            },
            "data": {"seq_length": _SEQUENCE, "vocab_size": _VOCABULARY},
            "optimizer": {"learning_rate": 1e-3},
            "training": {
                "name": "gradient-flow",
                "steps": 1,
                "global_batch_size": 1,
                "device": "cpu",
                "threads": 1,  # more threads would only synchronise, as products are small
            },
        },
        "gradient flow",
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loss(chunk: nn.Module, config: RunConfig) -> Tensor:
    """Mean cross entropy on random tokens."""
    length = config.data.seq_length
    rows = torch.randint(
        0, config.data.vocab_size, (1, length + 1), generator=_generator(config.training.seed)
    )
    positions = torch.arange(length)[None]
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    loss: Tensor = chunk(tokens, positions, None, labels=labels)
    return loss.mean()


def _fix_branches(chunk: nn.Module) -> None:
    """Make every branch a constant of RMS 1, as in the analysis."""

    def constant(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Any, Any]:
        branch, bias = output[0].detach(), output[1]
        return branch * branch.square().mean(-1, keepdim=True).rsqrt(), bias

    for layer in chunk.decoder.layers:  # type: ignore[union-attr]
        layer.self_attention.register_forward_hook(constant)
        layer.mlp.register_forward_hook(constant)
