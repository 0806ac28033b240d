"""The depth profile of one step, gathered on every rank and equal at every layout.

Every quantity is a sum or a maximum over the ranks, so a profile costs two all-reduces, and a step
without a profile costs nothing. Each element is counted on exactly one rank:

- The stream [s, b, h] is sharded along the sequence under sequence parallelism. Otherwise it is
  replicated over the tensor group, and the group's rank 0 counts it. Replicas see different
  sequences.
- Attention heads are sharded over the tensor group.
- The engine defines which elements of a parameter a rank owns (`Profiled.own_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from keel_megatron.architecture.residual import Reader
from keel_megatron.config.run import RunConfig
from keel_megatron.depth.profile import DepthProfile
from keel_megatron.kernels import scaled_add_norm
from keel_megatron.model.documents import same_document
from keel_megatron.model.join import COLUMNS, weight_of
from keel_megatron.model.layer import KeelLayer
from keel_megatron.runtime.distributed import Runtime

PROFILE = Reader("a depth profile (tracking.depth_every)", (*COLUMNS, "head_norms"))

_SUMS = {
    name: column
    for column, name in enumerate(
        (
            *("stream", "branch", "cosine", "size", "kept"),  # the order of `_joined`
            *("gradient", "matrix_gradient", "weight", "weights", "update"),
        )
    )
}
_LOGIT = 0
_NORMS = {"outer": 1, "inner": 4, "branch": 7}
"""First of three columns of the maxima: mean, -minimum, maximum."""
_MAXIMA = 10
_QUERIES = 512
_TOGETHER = 4
"""Matrices, a block's worth, whose updates are compared at once."""


class Profiled(Protocol):
    """What a profile needs from the engine."""

    config: RunConfig
    runtime: Runtime
    chunks: list[nn.Module]
    """This rank's model chunks, not wrapped."""

    def own_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The averaged gradient of the elements of a parameter that this rank owns, flat.

        Each element is owned by one rank. None if this rank owns none; valid between the
        passes and the update (`DepthCollector.before_update`).
        """

    def own_weight(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weights that belong to `own_gradient`, flat, as the optimizer updates them."""


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, not a norm weight; also where ZeRO 3 has emptied it."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


class DepthCollector:
    """Collects the profile of one step: `watching` its passes, then around its update.

    Args:
        engine: runs the step.
        batch_size: the step's sequences; None: training.global_batch_size.
    """

    def __init__(self, engine: Profiled, batch_size: int | None = None) -> None:
        config, runtime = engine.config, engine.runtime
        self._batch_size = batch_size or config.training.global_batch_size
        self._config = config
        self._runtime = runtime
        self._engine = engine
        self._layers: list[KeelLayer] = [
            layer
            for chunk in engine.chunks
            for layer in chunk.decoder.layers  # type: ignore[union-attr]
        ]
        self._outer = {l: module for layer in self._layers for l, module in _norms(layer, "outer")}
        rows = config.model.sub_layers
        new = partial(torch.full, dtype=torch.float64, device=runtime.device)
        self._sums = new((rows, len(_SUMS)), 0.0)
        self._maxima = new((rows, _MAXIMA), -math.inf)
        self._weights: list[tuple[int, Tensor, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block every forward pass is observed; recomputed ones count once."""
        counts_stream = self._config.parallel.sequence or self._runtime.tensor_rank == 0
        hooks = []
        try:
            for layer in self._layers:
                layer.observer = self._joined if counts_stream else None
                hook = partial(self._attended, _first_sub_layer(layer))
                hooks.append(layer.self_attention.core_attention.register_forward_pre_hook(hook))
            yield
        finally:
            for layer in self._layers:
                layer.observer = None
            for handle in hooks:
                handle.remove()

    @torch.no_grad()
    def before_update(self) -> None:
        """Read gradients, weights and norm weights; call it after the backward pass is finalized.

        Keeps a copy of this rank's share of the fp32 matrices in host memory until `after_update`:
        4 bytes a parameter, which the device may not have.
        """
        pieces = list(self._pieces())
        self._add("gradient", [(l, gradient) for l, gradient, _weight in pieces])
        of_matrices = [(l, gradient) for l, gradient, weight in pieces if weight is not None]
        self._add("matrix_gradient", of_matrices)
        matrices = [(l, weight) for l, _gradient, weight in pieces if weight is not None]
        self._add("weight", matrices)
        for l, weight in matrices:
            self._sums[l, _SUMS["weights"]] += weight.numel()
        self._weights = [(l, weight, _host_copy(weight)) for l, weight in matrices]
        self._read_norm_weights()

    @torch.no_grad()
    def after_update(self) -> None:
        """Compare the weights with what they were, a few at a time: they come from the host."""
        for start in range(0, len(self._weights), _TOGETHER):
            some = self._weights[start : start + _TOGETHER]
            self._add(
                "update", [(l, before.to(after.device).sub_(after)) for l, after, before in some]
            )
        self._weights = []

    def profile(self, step: int) -> DepthProfile:
        """Reduce over all ranks; collective, the same result on each."""
        # Not every backend's maximum passes a NaN on; infinity is no finite number either.
        self._maxima.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        dist.all_reduce(self._sums)
        dist.all_reduce(self._maxima, op=dist.ReduceOp.MAX)
        sums = dict(zip(_SUMS, self._sums.cpu().numpy().T, strict=True))
        maxima = self._maxima.cpu().numpy().T
        tokens = self._batch_size * self._config.data.seq_length
        elements = tokens * self._config.model.hidden_size
        with np.errstate(all="ignore"):
            found = {
                "gradient_norm": np.sqrt(sums["gradient"]),
                "gradient_rms": np.sqrt(sums["matrix_gradient"] / sums["weights"]),
                "stream_rms": np.sqrt(sums["stream"] / elements),
                "branch_rms": np.sqrt(sums["branch"] / elements),
                "update_cosine": sums["cosine"] / tokens,
                "update_size": sums["size"] / tokens,
                "update_kept": sums["kept"] / tokens,
                "weight_rms": np.sqrt(sums["weight"] / sums["weights"]),
                "update_to_weight": np.sqrt(sums["update"] / sums["weight"]),
                "attention_logit_max": maxima[_LOGIT],
            }
            for which, column in _NORMS.items():
                found[f"{which}_gain_mean"] = maxima[column]
                found[f"{which}_gain_min"] = -maxima[column + 1]
                found[f"{which}_gain_max"] = maxima[column + 2]
        return DepthProfile.of(step, found, self._absent())

    def _joined(self, l: int, x: Tensor, f: Tensor, alpha: float, x_new: Tensor) -> None:
        """Add a micro-batch's sum at sub-layer l; x, f and x_new are [s, b, h]."""
        # Under recomputation the first pass builds no graph; the second runs in the backward pass.
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            f = f.to(x.dtype)
            x_norm, f_norm, new_norm = (torch.linalg.vector_norm(t, dim=-1) for t in (x, f, x_new))
            tiny = torch.finfo(x.dtype).tiny
            size = f_norm / (alpha * x_norm).clamp(min=tiny)
            rows = [new_norm.square(), f_norm.square(), _cosine(x, f), size]
            if self._config.model.stream != "fp32":
                outer = weight_of(self._outer.get(l))
                epsilon = self._config.model.norm_epsilon
                exact, _z = scaled_add_norm(x, f, alpha, outer, None, epsilon, x.dtype)
                rows.append(_cosine(x_new - x, exact - x))
            sums = torch.stack(rows).flatten(1).sum(1, dtype=torch.float64)
            self._sums[l, : len(rows)] += sums

    def _attended(self, l: int, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Take the largest logit of sub-layer l's attention, from what its kernel is given."""
        if torch.is_grad_enabled():
            query, key, _value, documents = arguments[:4]
            numbers = None if documents is None else documents.numbers
            found = self._maxima[l, _LOGIT]
            torch.maximum(found, logit_max(query, key, numbers).to(found.dtype), out=found)

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(l, flat fp32 gradient, flat fp32 weight) of the elements that this rank owns.

        The weight is None for norm weights: they are about 1, so in narrow models they would
        dominate the norm of the matrices.
        """
        for layer in self._layers:
            for l, parameter in _parameters(layer):
                gradient = self._engine.own_gradient(parameter)
                if gradient is not None:
                    matrix = is_matrix(parameter)
                    yield l, gradient, self._engine.own_weight(parameter) if matrix else None

    def _add(self, name: str, pieces: list[tuple[int, Tensor]]) -> None:
        """Add the squared norms of flat tensors to their sub-layers' sums."""
        if pieces:
            rows = torch.tensor([l for l, _piece in pieces], device=self._runtime.device)
            norms = torch.stack(
                torch._foreach_norm([piece for _l, piece in pieces], 2, torch.float64)
            )
            norms = norms.to(rows.device)  # an offloaded optimizer's are the host's
            self._sums[:, _SUMS[name]].index_add_(0, rows, norms.square_())

    def _read_norm_weights(self) -> None:
        """Mean, minimum and maximum of norm weights, which every rank that has them holds whole."""
        for which, column in _NORMS.items():
            weights = {
                l: weight.detach()
                for layer in self._layers
                for l, module in _norms(layer, which)
                for weight in module.parameters()
            }
            if weights:
                stacked = torch.stack(list(weights.values())).double()
                found = torch.stack((stacked.mean(1), -stacked.amin(1), stacked.amax(1)), dim=1)
                self._maxima[list(weights), column : column + 3] = found

    def _absent(self) -> dict[str, list[bool]]:
        """For each kind of quantity, the sub-layers that lack it."""
        model = self._config.model
        rules = [PROFILE.sub_layer(l, model) for l in range(model.sub_layers)]
        return {
            "outer_gain": [not rule.outer_norm for rule in rules],
            "inner_gain": [rule.inner == "none" for rule in rules],
            "branch_gain": [not rule.branch_norm for rule in rules],
            "update_kept": [model.stream == "fp32"] * model.sub_layers,
            "attention_logit": [l % 2 == 1 for l in range(model.sub_layers)],
        }


def logit_max(query: Tensor, key: Tensor, documents: Tensor | None = None) -> Tensor:
    """The largest causal q k / sqrt(d), over blocks of queries: never s x s elements at once.

    Args:
        query: [s, b, heads, d].
        key: [s, b, groups, d]; heads is a multiple of groups.
        documents: numbers of the tokens' documents [b, s]; only pairs within one count.

    Returns:
        A scalar in the compute type.
    """
    s, _b, heads, d = query.shape
    q = query.detach().permute(1, 2, 0, 3) * d**-0.5
    k = key.detach().permute(1, 2, 3, 0).repeat_interleave(heads // key.size(2), dim=1)
    largest = q.new_full((), -math.inf)
    for start in range(0, s, _QUERIES):
        stop = min(start + _QUERIES, s)
        scores = q[:, :, start:stop] @ k[..., :stop]
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., start:].masked_fill_(future, -math.inf)
        if documents is not None:
            together = same_document(documents[:, start:stop], documents[:, :stop])
            scores.masked_fill_(together.logical_not_(), -math.inf)
        largest = torch.maximum(largest, scores.amax())
    return largest


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of vectors [..., h], [...]; 0 where one is 0."""
    tiny = torch.finfo(one.dtype).tiny
    lengths = [torch.linalg.vector_norm(t, dim=-1).clamp(min=tiny) for t in (one, other)]
    return torch.linalg.vecdot(one, other) / lengths[0] / lengths[1]


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def _first_sub_layer(layer: KeelLayer) -> int:
    return 2 * (int(layer.layer_number) - 1)


def _norms(layer: KeelLayer, which: str) -> Iterator[tuple[int, nn.Module]]:
    """(l, module) of a block's two outer, inner or branch norms, or mixes of streams.

    Of inner norms, what is in their place.
    """
    l = _first_sub_layer(layer)
    if which == "outer":
        modules = (layer.attention_outer_norm, layer.mlp_outer_norm)
    elif which == "branch":
        modules = (layer.attention_branch_norm, layer.mlp_branch_norm)
    elif which == "streams":
        modules = (layer.attention_streams, layer.mlp_streams)
    else:
        modules = (layer.input_layernorm, layer.pre_mlp_layernorm)
    for number, module in enumerate(modules):
        if module is not None:
            yield l + number, module


def _parameters(layer: KeelLayer) -> Iterator[tuple[int, nn.Parameter]]:
    """(l, parameter) of the block: a sub-layer is its branch and its norms."""
    l = _first_sub_layer(layer)
    parts = [
        *_norms(layer, "inner"),
        (l, layer.self_attention),
        (l + 1, layer.mlp),
        *_norms(layer, "branch"),
        *_norms(layer, "streams"),
        *_norms(layer, "outer"),
    ]
    for number, module in parts:
        for parameter in module.parameters():
            yield number, parameter
