"""A pipeline stage of a model, one sub-layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keel_megatron.architecture.residual import Reader
from keel_megatron.config.model import ModelConfig
from keel_megatron.data.batches import Batch
from keel_megatron.kernels import scaled_add_norm
from keel_megatron.model.documents import Documents
from keel_megatron.model.join import COLUMNS, join
from keel_megatron.model.layer import AfterWeights
from keel_megatron.model.stream import stored, storing
from keel_megatron.studies.redundancy.units import Removal

STUDY = Reader(
    "the study of redundancy", (*(name for name in COLUMNS if name != "streams"), "head_norms")
)


class Stage:
    """The sub-layers of a chunk: passed, or removed.

    In training's forward pass a join computes the following branch's input too. Here it is unknown
    what follows, so each sub-layer begins with its own inner norm.

    Args:
        chunk: this stage's model (model/language_model.py).
        model: the model's section of the configuration.
        removal: what removing a sub-layer means (`units`).

    Attributes:
        sub_layers: their numbers over the whole model.
        passes: sequences that have passed a sub-layer, counted once for each.
    """

    def __init__(self, chunk: Any, model: ModelConfig, removal: Removal) -> None:
        self._chunk, self._removal, self._stream = chunk.eval(), removal, model.stream
        self._operation = storing(model.stream, scaled_add_norm)
        layers = list(chunk.decoder.layers)
        first = 2 * (layers[0].layer_number - 1) if layers else 0
        self._layers = {first + 2 * number: layer for number, layer in enumerate(layers)}
        self.sub_layers = range(first, first + 2 * len(layers))
        self._rules = {l: STUDY.sub_layer(l, model) for l in self.sub_layers}
        self.passes = 0
        self._rotary: Tensor | None = None
        self._batch, self._size = Batch(), 1
        self._copies: dict[int, _Copies] = {}

    def begin(self, batch: Batch, size: int, length: int) -> None:
        """Begin a batch of so many sequences of so many tokens."""
        self._batch, self._size = batch, size
        self._copies = {}
        if self._layers:
            self._rotary = self._chunk.rotary_pos_emb(length)

    def embedded(self) -> Tensor:
        """The stream x_0 [s, b, h] of the batch's sequences, on the first stage."""
        x: Tensor = self._chunk.embedding(input_ids=self._batch.tokens, position_ids=None)
        return stored(self._stream, x.to(torch.float32), None)

    def apply(self, l: int, x: Tensor) -> Tensor:
        """The stream [s, n b, h] after sub-layer l of this stage, for n variants of the batch."""
        self.passes += x.size(1)
        layer, attention = self._layers[l - l % 2], l % 2 == 0
        z = layer.inner("attention" if attention else "mlp")[1](x)
        if attention:
            branch, _bias = layer.self_attention(
                z, None, rotary_pos_emb=self._rotary, attention_bias=self._for(x).documents
            )
        else:
            branch, _bias = layer.mlp(z)
        return self._joined(l, x, branch)

    def without(self, l: int, x: Tensor) -> Tensor:
        """The stream after sub-layer l, if it is removed."""
        return x if self._removal == "sub-layer" else self._joined(l, x, torch.zeros_like(x))

    def losses(self, x: Tensor) -> Tensor:
        """Of the stream [s, n b, h] after the last stage: summed losses of each sequence [n, b].

        In nats, fp64; tokens that do not count are left out.
        """
        chunk, labels, mask = self._chunk, self._for(x).labels, self._for(x).loss_mask
        assert labels is not None
        z = chunk.decoder.final_layernorm(x)
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else None
        losses, _bias = chunk.output_layer(z, weight, labels=labels)
        losses = losses.double() if mask is None else losses.double() * mask
        return losses.sum(-1).view(-1, self._size)

    def _joined(self, l: int, x: Tensor, branch: Tensor) -> Tensor:
        layer = self._layers[l - l % 2]
        weights: AfterWeights = layer.after_weights("mlp" if l % 2 else "attention")
        epsilon, dtype = layer.config.layernorm_epsilon, layer.config.params_dtype
        x_new, _unknown = join(
            self._operation, self._rules[l], x, branch, *weights, None, epsilon, dtype
        )
        return x_new

    def _for(self, x: Tensor) -> _Copies:
        """What belongs to a stream [s, n b, h]; kept for the trunk (n = 1) and the latest n."""
        variants = x.size(1) // self._size
        if variants not in self._copies:
            self._copies = {n: copies for n, copies in self._copies.items() if n == 1}
            self._copies[variants] = _repeated(self._batch, variants)
        return self._copies[variants]


@dataclass(frozen=True)
class _Copies:
    """What blocks and head use of a batch, for several variants of it."""

    labels: Tensor | None
    loss_mask: Tensor | None
    documents: Documents | None


def _repeated(batch: Batch, times: int) -> _Copies:
    """A batch's sequences, one after another, so many times."""
    labels, mask, numbers = (
        None if part is None else part.repeat(times, 1)
        for part in (batch.labels, batch.loss_mask, batch.documents)
    )
    if numbers is None:
        return _Copies(labels, mask, None)
    # On CUDA a kernel wants the documents' borders, too.
    whole = Batch(documents=numbers).to(numbers.device)
    return _Copies(labels, mask, Documents(numbers, whole.borders, whole.longest))
