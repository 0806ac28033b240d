"""Names: what a parameter is called in a checkpoint and in a Hugging Face folder.

A checkpoint has Megatron-core's fused matrices, a Hugging Face folder one matrix a projection:
linear_qkv's rows are, for each key/value head, its queries, its key and its value; linear_fc1's are
the gate's, then the values'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from keel_megatron.architecture.residual import Reader, SubLayer
from keel_megatron.config.model import ModelConfig

EXPORT = Reader(
    "an exported model",
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


@dataclass(frozen=True)
class Fused:
    """A parameter of a checkpoint, and the parts of it that a Hugging Face folder has."""

    name: str
    """In the checkpoint."""
    shape: tuple[int, ...]
    """Global, in the checkpoint."""
    parts: dict[str, tuple[int, ...]]
    """Name in the Hugging Face folder to shape there."""
    split: Callable[[Tensor], tuple[Tensor, ...]]
    """The parts of the parameter, in order."""
    join: Callable[[tuple[Tensor, ...]], Tensor]
    """Back."""


def is_llama(model: ModelConfig) -> bool:
    """Whether a model is a Llama, and exported as one: pre-norm with a final norm."""
    return model.residual == "pre_ln" and model.final_norm and not model.qk_norm


def parameters(model: ModelConfig, vocab_size: int) -> Iterator[Fused]:
    """Every parameter of a model, in the order of the forward pass.

    Args:
        model: section `model` of the run.
        vocab_size: rows of the embedding.

    Raises:
        UserError: the residual rule has a column that an exported model does not know.
    """
    h, llama = model.hidden_size, is_llama(model)
    yield _same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (vocab_size, h))
    if model.embedding_norm:
        yield _same("embedding_norm.weight", "model.embedding_norm.weight", (h,))
    for block in range(model.blocks):
        yield from _block(model, block, llama)
    if model.final_norm:
        yield _same("decoder.final_layernorm.weight", "model.norm.weight", (h,))
    if not model.tie_embeddings:
        yield _same("output_layer.weight", "lm_head.weight", (vocab_size, h))


def _block(model: ModelConfig, block: int, llama: bool) -> Iterator[Fused]:
    h, ffn = model.hidden_size, model.ffn_hidden_size
    ours, theirs = f"decoder.layers.{block}", f"model.layers.{block}"
    attention, mlp = (EXPORT.sub_layer(2 * block + i, model) for i in (0, 1))
    names = ("input_layernorm", "post_attention_layernorm")
    if not llama:
        names = ("attention_layernorm", "feedforward_layernorm")
    yield from _inner(attention, f"{ours}.input_layernorm", f"{theirs}.{names[0]}", h)
    yield _qkv(model, f"{ours}.self_attention.linear_qkv.weight", f"{theirs}.self_attn")
    for part in attention.head_norms:
        norm = f"{ours}.self_attention.{part}_layernorm.weight"
        yield _same(norm, f"{theirs}.self_attn.{part}_norm.weight", (model.head_dim,))
    yield _same(
        f"{ours}.self_attention.linear_proj.weight", f"{theirs}.self_attn.o_proj.weight", (h, h)
    )
    yield from _outer(attention, f"{ours}.attention", f"{theirs}.{{}}attention_layernorm", h)
    yield from _mix(attention, f"{ours}.attention", f"{theirs}.attention")
    yield from _inner(mlp, f"{ours}.pre_mlp_layernorm", f"{theirs}.{names[1]}", h)
    yield Fused(
        f"{ours}.mlp.linear_fc1.weight",
        (2 * ffn, h),
        {f"{theirs}.mlp.{part}_proj.weight": (ffn, h) for part in ("gate", "up")},
        lambda fused: tuple(fused.chunk(2)),
        torch.cat,
    )
    yield _same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.mlp.down_proj.weight", (h, ffn))
    yield from _outer(mlp, f"{ours}.mlp", f"{theirs}.{{}}feedforward_layernorm", h)
    yield from _mix(mlp, f"{ours}.mlp", f"{theirs}.feedforward")


def _same(ours: str, theirs: str, shape: tuple[int, ...]) -> Fused:
    return Fused(ours, shape, {theirs: shape}, lambda fused: (fused,), lambda parts: parts[0])


def _inner(rule: SubLayer, ours: str, theirs: str, h: int) -> Iterator[Fused]:
    if rule.inner != "none":
        yield _same(f"{ours}.weight", f"{theirs}.weight", (h,))


def _outer(rule: SubLayer, ours: str, theirs: str, h: int) -> Iterator[Fused]:
    """The norms after the branch, N_b and N_out, whose prefix goes into `theirs`."""
    if rule.branch_norm:
        yield _same(f"{ours}_branch_norm.weight", f"{theirs.format('branch_')}.weight", (h,))
    if rule.outer_norm:
        yield _same(f"{ours}_outer_norm.weight", f"{theirs.format('post_')}.weight", (h,))


def _mix(rule: SubLayer, ours: str, theirs: str) -> Iterator[Fused]:
    """The mix of several streams."""
    if (n := rule.streams) > 1:
        yield _same(f"{ours}_streams.weight", f"{theirs}_streams.weight", (n * (n + 2),))


def _qkv(model: ModelConfig, ours: str, theirs: str) -> Fused:
    """linear_qkv: [groups, queries of a group + key + value, d] rows of h columns."""
    h, d, groups = model.hidden_size, model.head_dim, model.query_groups
    shared = model.num_attention_heads // groups
    rows = [shared * d, d, d]

    def split(fused: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(fused.view(groups, sum(rows), h), rows, dim=1)
        return tuple(part.reshape(-1, h) for part in parts)

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        by_group = [part.view(groups, -1, h) for part in parts]
        return torch.cat(by_group, dim=1).reshape(-1, h)

    shapes: dict[str, tuple[int, ...]] = {
        f"{theirs}.{p}_proj.weight": (groups * n, h) for p, n in zip("qkv", rows, strict=True)
    }
    return Fused(ours, (groups * sum(rows), h), shapes, split, join)
