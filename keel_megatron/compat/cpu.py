"""Everything that lets Megatron-core, which assumes CUDA, run on a CPU.

Megatron-core's modules ask `torch` for tensors on `"cuda"`, for the current CUDA device and for
the CUDA generator. `install` gives those modules, and no others, a `torch` of their own: the same
module but for the few factories that take a device and for its `cuda` namespace, which answer for
the CPU. The rest of the program sees the real torch, and no operator pays for the translation.

Three things cannot be reached that way and are patched where they live: the two generator
functions of `tensor_parallel.random`, `Tensor.cuda`, and `Tensor.type()`, whose string the
optimizer compares with CUDA's.

Never installed where CUDA is used.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from keel_megatron.compat.patch_table import patch

_CPU = torch.device("cpu")

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "empty_like")

# The parts of Megatron-core that this project stands on; imported before they are adapted.
MODULES = (
    "parallel_state",
    "tensor_parallel",
    "tensor_parallel.random",
    "pipeline_parallel",
    "distributed",
    "optimizer",
    "transformer",
    "models.gpt",
    "dist_checkpointing",
    "dist_checkpointing.strategies.torch",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.async_utils",
    "datasets.gpt_dataset",
    "rerun_state_machine",
)


@patch(
    changes="the name `torch` in Megatron-core's modules, and no others; on a CPU alone",
    why="they make tensors on `cuda` and ask for the current CUDA device",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/runtime/test_runtime.py::test_torch_itself_is_left_alone_on_a_cpu",
)
def install() -> None:
    """Adapt Megatron-core to this process's CPU. Calling it again changes nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Apex and Transformer Engine are absent: expected here
        for name in MODULES:
            importlib.import_module(f"megatron.core.{name}")
    if isinstance(vars(sys.modules["megatron.core.parallel_state"])["torch"], _CpuTorch):
        return
    substitute = _CpuTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = substitute
    adapt_generator()
    adapt_tensor()


class _CpuTorch(types.ModuleType):
    """`torch` as Megatron-core's modules see it: whatever they want on CUDA is on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__.update(torch.__dict__)
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))
        self.cuda = _cuda_namespace()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that takes "cuda" (or a CUDA ordinal) to mean the CPU."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_cpu


def _cuda_namespace() -> types.ModuleType:
    """`torch.cuda` with the answers of a CPU."""
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    # Asked for by DDP from 0.19 on, to wait for events that only a replayed CUDA graph records.
    stream = types.SimpleNamespace(wait_event=_nothing, wait_stream=_nothing)
    answers: dict[str, Any] = {
        "current_stream": lambda *_args, **_kwargs: stream,
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "is_available": lambda: False,
        "set_device": lambda _device: None,
        "synchronize": lambda *_args, **_kwargs: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    cuda.__dict__.update(answers)
    return cuda


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In place of waiting for a device."""


@patch(
    changes="`_get_cuda_rng_state` and `_set_cuda_rng_state` of tensor_parallel.random, and a "
    "filter of its log; on a CPU alone",
    why="its generators of model parallel dropout and of recomputation are CUDA's",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_cpu.py::test_forked_generators_draw_from_the_cpus",
)
def adapt_generator() -> None:
    """The generator that dropout draws from is the CPU's."""
    random = sys.modules["megatron.core.tensor_parallel.random"]
    checks: Any = random

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    checks._get_cuda_rng_state = get_state
    checks._set_cuda_rng_state = set_state
    # There, drawing from the CPU's generator inside a CUDA one's scope is a mistake; here it is
    # the purpose.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


@patch(
    changes="`torch.Tensor.cuda` and `torch.Tensor.type`; on a CPU alone",
    why="the optimizer moves tensors with `.cuda()` and compares `.type()` with CUDA's names",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/runtime/test_runtime.py::test_torch_itself_is_left_alone_on_a_cpu",
)
def adapt_tensor() -> None:
    """`.cuda()` stays where it is; `.type()` names the CUDA type that Megatron-core asserts."""
    tensor: Any = torch.Tensor
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        name = plain_type(self)
        return name.replace("torch.", "torch.cuda.", 1) if self.device == _CPU else name

    def stay(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    tensor.type = type_name
    tensor.cuda = stay
