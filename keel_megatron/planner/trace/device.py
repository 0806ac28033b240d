"""A CUDA device that is not there.

`install` makes `torch.cuda` of this process answer for one, and has Python see tensors without
data as that device's. Two kinds of tensors serve:

- meta tensors (`strict=False`): fast, but C++ does not check which device an operand is on;
- FakeTensors (`strict=True`): slower, and an operator whose operands are on different devices is
  found. C++ takes them for meta tensors too: a CPU build of torch has no guard for CUDA devices,
  and autograd would ask for one.

For a process that traces and ends: nothing is undone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

CUDA = torch.device("cuda", 0)
META = torch.device("meta")

_TYPE_NAMES = {
    torch.float64: "DoubleTensor",
    torch.float32: "FloatTensor",
    torch.bfloat16: "BFloat16Tensor",
    torch.float16: "HalfTensor",
    torch.int64: "LongTensor",
    torch.int32: "IntTensor",
    torch.uint8: "ByteTensor",
    torch.bool: "BoolTensor",
}
UNEQUAL = "_compares_unequal"
"""Set of results of comparisons that are false because every value is 1."""
_READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")


@dataclass(frozen=True)
class Gpu:
    """What the program asks of a device."""

    name: str
    memory_bytes: int
    processors: int
    """Streaming multiprocessors."""
    capability: tuple[int, int]


Wait = Callable[[str], None]
"""Is told what the host waits for."""


def install(
    gpu: Gpu, wait: Wait, device_of: Callable[[torch.Tensor], torch.device], *, strict: bool
) -> None:
    """Let this process have the device.

    Args:
        gpu: what it is.
        wait: called whenever the program would wait for the device.
        device_of: which device a meta tensor stands for.
        strict: FakeTensors, whose devices are checked.
    """
    _answer_for_cuda(gpu, wait)
    tensor: Any = torch.Tensor
    if strict:
        from torch._subclasses.fake_tensor import FakeTensor

        tensor = FakeTensor
        _hide_device_from_autograd()
        tensor.is_cuda = property(lambda self: self.fake_device.type == "cuda")
        _adapt_numpy()
    else:
        plain_device: Any = torch.Tensor.device

        def device(self: torch.Tensor) -> torch.device:
            real: torch.device = plain_device.__get__(self)
            return device_of(self) if real.type == "meta" else real

        tensor.device = property(device)
        tensor.is_cuda = property(lambda self: self.device.type == "cuda")
        _adapt_constructor()
    _adapt_tensor(tensor, wait)
    _allow_lists()


def _answer_for_cuda(gpu: Gpu, wait: Wait) -> None:
    """`torch.cuda` of a machine with this device."""
    import torch._dynamo  # it compares signatures with what is replaced here

    # Meta tensors have no generator: states are those of the CPU's before anything was drawn.
    state = torch.get_rng_state()
    properties = types.SimpleNamespace(
        name=gpu.name,
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.processors,
        major=gpu.capability[0],
        minor=gpu.capability[1],
    )
    answers: dict[str, Any] = {
        "_lazy_init": _nothing,
        "is_available": lambda: True,
        "current_device": lambda: CUDA,
        "device_count": lambda: 8,
        "set_device": _nothing,
        "empty_cache": _nothing,
        "get_rng_state": lambda *_args, **_kwargs: state,
        "set_rng_state": _nothing,
        "manual_seed": _nothing,
        "get_device_properties": lambda *_args: properties,
        "get_device_capability": lambda *_args: gpu.capability,
        "get_device_name": lambda *_args: gpu.name,
        "synchronize": lambda *_args: wait("torch.cuda.synchronize"),
        "Stream": _Queue,
        "Event": _Queue,
        "current_stream": _Queue,
        "stream": lambda _stream: nullcontext(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In the place of what a device would do."""


class _Queue:
    """In the place of a stream or an event: all is done as soon as it is asked for."""

    __init__ = wait_stream = wait_event = record = _nothing


def _hide_device_from_autograd() -> None:
    """C++ sees FakeTensors as meta tensors, Python sees the device."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode: Any = FakeTensorMode
    mode.avoid_device_init = True  # else it makes values that it knows on the device

    tensor: Any = torch.Tensor
    make = tensor._make_subclass

    def make_subclass(cls: type, elem: Any, requires_grad: bool = False, **options: Any) -> Any:
        if issubclass(cls, FakeTensor):
            options["dispatch_device"] = False
        return make(cls, elem, requires_grad, **options)

    tensor._make_subclass = staticmethod(make_subclass)


def _adapt_numpy() -> None:
    """Arrays of ones: FakeTensorMode takes every tensor for one of its own, without data."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    tensor: Any = torch.Tensor
    plain = tensor.numpy

    def numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return plain(torch.ones(self.shape, dtype=self.dtype), *args, **kwargs)

    tensor.numpy = numpy


def _adapt_tensor(tensor: Any, wait: Wait) -> None:
    """Types' names, `.cuda()`, and values: there are none, so every one read is 1, and a wait."""
    plain_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        return ("torch.cuda." if self.is_cuda else "torch.") + _TYPE_NAMES[self.dtype]

    plain_pointer = torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        """What tells two tensors apart that have no address."""
        if not self.is_cuda:
            return plain_pointer(self)
        return self.untyped_storage()._cdata + self.storage_offset() * self.element_size()

    tensor.type = type_name
    tensor.data_ptr = data_ptr
    tensor.cuda = lambda self, *_args, **_kwargs: self.to(CUDA)
    for name in _READS:
        plain = None if tensor is not torch.Tensor else getattr(torch.Tensor, name)
        setattr(tensor, name, _read(name, plain, wait))


def _read(name: str, plain: Callable[..., Any] | None, wait: Wait) -> Callable[..., Any]:
    """A tensor's method that gives a value; `plain` of those that have some on the host."""
    convert: Any = {"__int__": int, "__bool__": bool, "__float__": float, "__index__": int}.get(
        name
    )

    def read(self: torch.Tensor, *args: Any) -> Any:
        """Count a wait and return ones for a CUDA tensor; the value for a tensor of the host."""
        if self.is_cuda:
            wait(name.strip("_"))
        elif plain is not None:
            return plain(self, *args)
        if getattr(self, UNEQUAL, False):
            return False
        value: Any = 1.0 if self.dtype.is_floating_point else 1
        if name == "tolist":
            return torch.full(self.shape, value, device="cpu").numpy().tolist()
        return convert(value) if convert else value

    return read


def _adapt_constructor() -> None:
    """`torch.tensor` on the device: made on the host, and copied by an operator.

    FakeTensorMode has it so by itself, where it is told that CUDA must not be touched.
    """
    torch_: Any = torch
    plain: Any = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = plain(data, *args, device="cpu", **kwargs)
        return made if device is None or torch.device(device).type == "cpu" else made.to(CUDA)

    torch_.tensor = tensor


def _allow_lists() -> None:
    """Torch's operators on lists exist for CUDA; it does not know that these tensors are there."""
    from torch.nn.utils import clip_grad
    from torch.utils import _foreach_utils

    for module in (clip_grad, _foreach_utils):
        for name in ("_has_foreach_support", "_device_has_foreach_support"):
            setattr(module, name, lambda *_args: True)
