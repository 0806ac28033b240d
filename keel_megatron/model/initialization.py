"""Initial weights that depend only on the seed, the global block number and the parameter name.

Every matrix is drawn in full from its own generator, on its device, and the rank keeps its shard.
So any parallel layout starts from the same model. No scaling of any
projection: N(0, init_std^2) everywhere (keel_paper.md, section 1), norm weights at 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keel_megatron.architecture.residual import branch_init_scale
from keel_megatron.config.model import ModelConfig
from keel_megatron.runtime.seeds import derive_seed


def global_parameters(chunk: nn.Module, *, tied: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model chunk under their layout-independent names.

    `decoder.layers.<number within the chunk>` becomes the global block number, from 0, and the
    last stage's copy of a tied embedding carries the embedding's name.
    """
    layers: nn.ModuleList = chunk.decoder.layers  # type: ignore[union-attr, assignment]

    def numbered(match: re.Match[str]) -> str:
        layer = layers[int(match[1])]
        return f"decoder.layers.{layer.layer_number - 1}."  # type: ignore[operator]

    for name, parameter in chunk.named_parameters():
        name = re.sub(r"^decoder\.layers\.(\d+)\.", numbered, name)
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        yield name, parameter


@torch.no_grad()
def initialize(
    chunk: nn.Module, model: ModelConfig, seed: int, tensor_rank: int, tensor_size: int
) -> None:
    """Set the weights of a model chunk in place; norm weights keep their value of 1.

    Parameters without data are left out.
    """
    for name, parameter in global_parameters(chunk, tied=model.tie_embeddings):
        if parameter.dim() == 1 or parameter.is_meta:
            continue
        whole_shape = list(parameter.shape)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if sharded:
            whole_shape[parameter.partition_dim] *= tensor_size  # type: ignore[attr-defined]
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(derive_seed(seed, "weight", name))
        whole = torch.empty(whole_shape, dtype=torch.float32, device=parameter.device)
        whole.normal_(0.0, model.init_std, generator=generator)
        _scale_branch(whole, name, model)
        if sharded:
            whole = _shard(
                whole,
                parameter.partition_dim,  # type: ignore[attr-defined]
                parameter.partition_stride,  # type: ignore[attr-defined]
                tensor_rank,
                tensor_size,
            )
        parameter.copy_(whole)


def _scale_branch(whole: Tensor, name: str, model: ModelConfig) -> None:
    """Scale value, output and FFN weights by the residual rule (architecture/residual.py)."""
    scale = branch_init_scale(model)
    if scale == 1.0 or ".layers." not in name:
        return
    if name.endswith("linear_qkv.weight"):
        # Rows of a group: its queries, its key, its value.
        groups = whole.view(model.query_groups, -1, model.head_dim, whole.size(1))
        groups[:, -1] *= scale
    else:
        whole *= scale


def _shard(whole: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """The rank's shard of a matrix: its slice of each of `stride` equal pieces."""
    pieces = whole.chunk(stride, dim=dim)
    return torch.cat([piece.chunk(size, dim=dim)[rank] for piece in pieces], dim=dim)
