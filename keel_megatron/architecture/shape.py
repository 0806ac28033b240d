"""The shape of a model, in plain values."""

from __future__ import annotations

from typing import Protocol

from keel_megatron.architecture.residual import Model


class ModelShape(Model, Protocol):
    """What parameter counts and FLOPs ask of a model: the section `model` of a configuration.

    It is a protocol, so that the configuration can be built on this room and not the reverse.
    """

    @property
    def hidden_size(self) -> int:
        """Width h of the residual stream."""

    @property
    def ffn_hidden_size(self) -> int:
        """Inner width of the SwiGLU feed-forward."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def query_groups(self) -> int:
        """Key/value heads."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""

    @property
    def embedding_norm(self) -> bool:
        """Whether a norm follows the embedding."""

    @property
    def final_norm(self) -> bool:
        """Whether a norm lies between the last block and the output head."""

    @property
    def tie_embeddings(self) -> bool:
        """Whether embedding and output head share one matrix."""
