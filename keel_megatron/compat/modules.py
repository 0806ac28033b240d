"""Modules that Megatron-core builds or calls: their classes, methods and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from keel_megatron.compat.patch_table import patch


@patch(
    changes="`output_layer.__class__` of a GPTModel",
    why="GPTModel builds Megatron-core's ColumnParallelLinear itself, with all that a pipeline "
    "shares of it, and takes no other",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/model/test_head.py::test_losses_train_like_those_of_the_logits",
)
def replace_output_layer(model: Any, kind: type[nn.Module]) -> Any:
    """Make a GPTModel's output layer one of a subclass of its own class, and return it."""
    model.output_layer.__class__ = kind
    return model.output_layer


@patch(
    changes="`forward` of a TransformerBlock",
    why="Megatron-core's own CUDA graphs record layer by layer and lose the gradient of a weight "
    "that belongs to the next layer, which a Keel layer multiplies with",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/model/test_graphs.py::test_recorded_blocks_train_like_plain_ones",
)
def replace_forward(decoder: Any, forward: Callable[..., Any]) -> None:
    """Let a chunk's blocks be run by another function."""
    decoder.forward = forward


@patch(
    changes="nothing; translates the arguments that TransformerLayer passes to its MLP",
    why="0.19 passes any MLP the collection of process groups, `is_mtp_layer` and a name, of which "
    "its own MLP takes the name alone; earlier ones pass nothing to an MLP that they do not know",
    needed_by="megatron-core 0.19.2",
    test="tests/compat/test_modules.py::test_an_mlp_is_built_by_any_version",
)
def mlp_arguments(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Megatron-core's MLP, from those that the layer passes.

    Args:
        config: Megatron-core's TransformerConfig.
        given: the keyword arguments beside `config` and `submodules`.
    """
    groups = given.get("pg_collection")
    return {
        "ffn_hidden_size": config.ffn_hidden_size,
        "tp_group": None if groups is None else groups.tp,
    }
