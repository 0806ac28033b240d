"""The comparison of parity.py for models of which not even one fits in memory.

Both models have vectors, embedding and head, and the matrices of one block: those of the block that
runs, read from the checkpoint or from the exported folder. What runs is the same code on the same
tokens as in the comparison of whole models, so the logits and their bound are the same. The
residual stream of some tokens is compared after every block too, which tells where models that
differ begin to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.weights import Weights
from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.naming import parameters
from keel_megatron.huggingface.reading import SavedWeights
from keel_megatron.model.language_model import build_model, move
from keel_megatron.runtime.distributed import Runtime

SAMPLED = 16
"""Tokens whose stream is compared."""
Read = Callable[[str], Tensor]


@contextmanager
def without_matrices() -> Iterator[None]:
    """Context in which modules are built with matrices that have no data; vectors have some."""

    def register(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Any:
        if parameter.dim() < 2 or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.to("meta"))

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()


class BlockByBlock:
    """A model whose blocks have their matrices only while they run.

    Args:
        model: built `without_matrices`.
        blocks: its blocks, in order.
        read: a parameter, fp32, by its name in the model.
        device: where it runs.
        sampled: numbers of the tokens whose streams are kept.
        batch_dim: dimension of the sequences in a block's output; the other is their tokens'.

    Attributes:
        streams: of the last pass, after each block, [sampled tokens, h] on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        read: Read,
        device: torch.device,
        sampled: Tensor,
        batch_dim: int,
    ) -> None:
        self.streams: list[Tensor] = []
        self._read, self._device = read, device
        self._sampled, self._batch_dim = sampled.to(device), batch_dim
        move(model, device)
        blocks = list(blocks)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.is_meta:
                    parameter.copy_(read(name))
        shared: dict[int, nn.Parameter] = {}
        for module, key, parameter in _matrices(model):
            if id(parameter) not in inside:
                place = id(parameter)
                if place not in shared:
                    shared[place] = self._filled(names[place])
                module._parameters[key] = shared[place]
        for block in blocks:
            self._stream(block, names)

    def _filled(self, name: str) -> nn.Parameter:
        return nn.Parameter(self._read(name).to(self._device), requires_grad=False)

    def _stream(self, block: nn.Module, names: dict[int, str]) -> None:
        """Have a block get its matrices before it runs, and lose them after."""
        empty = list(_matrices(block))

        def before(*_: Any) -> None:
            for module, key, parameter in empty:
                module._parameters[key] = self._filled(names[id(parameter)])

        def after(_block: nn.Module, _arguments: Any, output: Any) -> None:
            for module, key, parameter in empty:
                module._parameters[key] = parameter
            stream = output[0] if isinstance(output, tuple) else output
            rows = stream.movedim(self._batch_dim, 0).flatten(0, 1)
            self.streams.append(rows[self._sampled].float().cpu())

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters without data, with the module that has them and their name there."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                yield module, key, parameter


def bytes_held(config: RunConfig, tokens: int) -> int:
    """Bytes of what a model has at once, and of what a block computes.

    Args:
        config: the run.
        tokens: of all sequences.
    """
    model = config.model
    sizes = {
        fused.name: math.prod(fused.shape)
        for fused in parameters(model, config.data.vocab_size)
        if len(fused.shape) > 1
    }
    block = sum(size for name, size in sizes.items() if name.startswith("decoder.layers.0."))
    others = parameter_count(model, config.data.vocab_size) - model.blocks * block
    computed = tokens * (8 * model.hidden_size + 3 * model.ffn_hidden_size)
    return 4 * (others + block + computed)


def sampled(tokens: Tensor) -> Tensor:
    """Numbers of the tokens whose streams are compared, spread over all."""
    count = min(SAMPLED, tokens.numel())
    return torch.linspace(0, tokens.numel() - 1, count).round().long()


def first_different(own: list[Tensor], exported: list[Tensor], limit: float) -> str:
    """After which block the streams differ by more than the limit first, as a message.

    Args:
        own: the run's, after each block [tokens, h].
        exported: the exported model's.
        limit: largest ||exported - own|| / ||own|| of a token's stream.
    """
    pairs = zip(own, exported, strict=True)
    found = [
        float(((b - a).norm(dim=-1) / a.norm(dim=-1).clamp_min(1e-30)).max()) for a, b in pairs
    ]
    for block, difference in enumerate(found):
        if not difference <= limit:  # NaN too
            return f"the streams differ first after block {block}, by {difference:.2g} relative"
    return f"after every block the streams differ by at most {max(found):.2g} relative"


@torch.inference_mode()
def own_logits(
    checkpoint: Path, config: RunConfig, runtime: Runtime, tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Logits [tokens, vocabulary] as `parity.own_logits`, and streams as `BlockByBlock.streams`."""
    with without_matrices():
        (model,) = build_model(config, runtime)
    weights = Weights(checkpoint)
    shapes = {fused.name: fused.shape for fused in parameters(config.model, config.data.vocab_size)}

    def read(name: str) -> Tensor:
        values = weights.read(name, shapes[name])
        return values.to(dtype).to(torch.float32) if values.dim() > 1 else values

    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    place = runtime.device
    running = BlockByBlock(model.eval(), layers, read, place, sampled(tokens), batch_dim=1)
    positions = torch.arange(tokens.shape[1], device=place)[None]
    logits = model(tokens.to(place), positions, None)
    return logits.float().cpu().flatten(0, 1), running.streams


@torch.inference_mode()
def exported_logits(
    folder: Path, device: torch.device, tokens: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The same of an exported folder, computed by transformers in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    content = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    with without_matrices():
        model: Any = AutoModelForCausalLM.from_config(
            content, trust_remote_code=True, dtype=torch.float32
        )
    read = SavedWeights(folder).tensor
    layers = model.model.layers
    running = BlockByBlock(model.eval(), layers, read, device, sampled(tokens), batch_dim=0)
    logits = model(tokens.to(device), use_cache=False).logits
    return logits.float().cpu().flatten(0, 1), running.streams
