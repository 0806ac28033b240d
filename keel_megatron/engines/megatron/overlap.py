"""Communication between replicas, overlapped with the passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from keel_megatron.compat import data_parallel
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.distributed import Runtime


def overlaps_grad_reduce(config: RunConfig, runtime: Runtime) -> bool:
    """Whether gradients are reduced during the backward pass; one replica has nothing to reduce."""
    return config.parallel.overlap_grad_reduce and runtime.data_size > 1


def overlaps_param_gather(config: RunConfig, runtime: Runtime) -> bool:
    """Whether updated weights are gathered during the forward pass."""
    return config.parallel.overlap_param_gather and runtime.data_size > 1


class OverlappedDataParallel(DistributedDataParallel):
    """DDP whose layers add weight gradients to `main_grad`, and whose weights another gathers.

    Megatron-core waits for gathered weights in the pre-hook of each module that has them. A Keel
    layer reads norm weights without calling their modules, and those of the next layer too; so
    `ParameterGather` waits instead.
    """

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        """Megatron-core's hook, which does not keep this object.

        The hook belongs to a node of autograd that this object keeps, a cycle that Python cannot
        see: the model and its process groups would stay for as long as the process.
        """
        own: Any = weakref.proxy(self)
        hook = DistributedDataParallel._make_backward_post_hook(own, param)
        return data_parallel.ready_without_gradient(hook, own, param)

    def enable_forward_pre_hook(self) -> None:
        """Leave the waiting to `ParameterGather`."""


class ParameterGather:
    """Gathers all weights after an update, and waits for them just before they are read.

    All gathers start at once, in the order of the forward pass; each block waits for what it reads.

    Args:
        wrapped: this stage's chunks in DDP.
        whole: wait for all blocks of a chunk together, as their captured CUDA graph needs it.
    """

    def __init__(self, wrapped: list[Any], *, whole: bool = False) -> None:
        # DDP fills its buffers from the last parameter to the first. Those of norm weights are the
        # last and small.
        self._groups = [group for chunk in wrapped for group in reversed(chunk.bucket_groups)]
        for chunk in wrapped:
            for module, parameters in _readers(chunk.module, whole=whole):
                needed = [chunk.param_to_bucket_group[parameter] for parameter in parameters]
                groups = list(dict.fromkeys(needed))
                if groups:
                    module.register_forward_pre_hook(_Wait(groups))

    def start(self) -> None:
        """Start gathering; the weights are stale until it is finished."""
        self.finish()
        for group in self._groups:
            group.start_param_sync()

    def finish(self) -> None:
        """Wait for all weights."""
        _wait(self._groups)


class _Wait:
    """A module's pre-hook that waits for the weights that the module reads."""

    def __init__(self, groups: list[Any]) -> None:
        self._groups = groups

    def __call__(self, *_arguments: Any) -> None:
        _wait(self._groups)


def _wait(groups: list[Any]) -> None:
    for group in groups:
        if group.param_gather_handle is not None:
            group.param_gather_handle.wait()
            group.param_gather_handle = None


def _readers(chunk: Any, *, whole: bool) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Modules of a chunk, each with the parameters that its forward pass reads."""
    layers = list(chunk.decoder.layers)
    inside = {module for layer in layers for module in layer.modules()}
    if whole:
        yield chunk.decoder, [parameter for layer in layers for parameter in layer.parameters()]
    else:
        for layer in layers:
            # The last sum of a block and the next block's norm are one kernel.
            after = [
                module
                for following in layer.following
                for module in (following.input_layernorm, following.attention_streams)
                if module is not None
            ]
            yield layer, [p for module in (layer, *after) for p in module.parameters()]
    for module in chunk.modules():
        if module not in inside:
            yield module, list(module.parameters(recurse=False))
