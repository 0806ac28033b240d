"""Counts what a program does to a device, operator by operator.

Memory is counted by storages: one lives from the operator that makes it until Python and autograd
have let go of it, as in torch's allocator. The rest is counted by phase: a part of the program
between two calls of `enter`.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keel_megatron.planner.trace.counts import NO_KERNEL, flops, workspace
from keel_megatron.planner.trace.device import CUDA, META, UNEQUAL

REAL_BYTES = 1 << 20
"""What is copied to the host becomes a real tensor of ones up to this size, and has no data above
it."""
DEVICE_COPIES = {"aten._to_copy", "aten.copy_"}
"""Operators whose purpose it is to have operands on two devices."""
MIXED_ALLOWED = {
    "aten.add_": "an addend of no dimensions may be the host's (CUDA takes it as a number)",
    "aten.index_put_": "indices may be the host's",
}
"""Other operators that may, and why."""

_UNEQUAL = ("aten.ne", "aten.lt", "aten.gt")


def rounded(size: int) -> int:
    """The bytes that torch's allocator hands out for so many."""
    return -(-size // 512) * 512


@dataclass
class Phase:
    """What happened in a part of the program."""

    peak: int = 0
    """Most bytes that lived at once."""
    peak_by: dict[str, int] = field(default_factory=dict)
    """The same by the phase that made them."""
    peak_operator: str = ""
    peak_where: str = ""
    kernels: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    messages: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(operation, group) to how many and their bytes."""
    waits: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    """Operators whose operands are on two devices; only FakeTensors show them."""
    host_peak: int = 0
    """Most bytes of tensors without data that stood for the host's."""


_ONLY_WORK = {
    f"c10d.{name}" for name in ("send", "recv_", "barrier", "reduce_", "gather_", "alltoall_base_")
}
"""Messages that return no tensors."""


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it operators on a device that is not there are counted, not run.

    Args:
        strict: the tensors are FakeTensors; otherwise meta tensors.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.strict = strict
        self.groups: dict[str, str] = {}
        """What torch's process groups are called in the report."""
        self.phases: dict[str, Phase] = {}
        self.events: list[tuple[int, int]] = []
        """(bytes, key) of every allocation, (-bytes, key) of its end."""
        self.marks: list[tuple[int, str]] = []
        """Number of events when a phase began."""
        self.now = self.host_now = 0
        self.host: set[int] = set()
        """Storages without data that stand for the host's."""
        self.host_factories = False
        """Whether what is made on the host, from `REAL_BYTES` on, has no data either."""
        self._running = False
        self._live: dict[int, tuple[str, int, int]] = {}
        """Storages: phase that made it, bytes, key of its events."""
        self._by: Counter[str] = Counter()
        self._keys = 0
        self._operator = ""
        self.enter("build")

    def enter(self, name: str) -> None:
        """Begin a phase, or resume it."""
        self.name = name
        self.phase = self.phases.setdefault(name, Phase())
        self.marks.append((len(self.events), name))
        self._note()

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase inside of another one."""
        outer = self.name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def wait(self, what: str) -> None:
        """Count a wait of the host for the device, by the function that asks for it."""
        self.phase.waits[f"{what} in {caller()}"] += 1

    def launch(self, name: str) -> None:
        """Count a kernel that is no operator of torch's."""
        self._operator = name
        self.phase.kernels[name] += 1

    def device_of(self, tensor: Tensor) -> torch.device:
        """Which device a meta tensor stands for; its own where torch's operators ask."""
        if self._running:
            return META
        return torch.device("cpu") if self._stands_for_host(tensor) else CUDA

    def _stands_for_host(self, tensor: Tensor) -> bool:
        return bool(self.host) and tensor.untyped_storage()._cdata in self.host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        self._operator = name
        kwargs = kwargs or {}
        if name.startswith("c10d."):
            return self._message(name, args)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.is_cuda for t in given)
        target = kwargs.get("device")
        if on_device and name == "aten._to_copy" and target is not None and target.type == "cpu":
            return self._to_host(args[0], kwargs)
        if on_device and name == "aten.copy_" and not args[0].is_cuda:
            if not (args[2:] and args[2]):  # non_blocking: to pinned memory
                self.wait("copy to the host")
            if not self.strict:
                return args[0]
        if kwargs.get("pin_memory"):  # there is no driver that could
            kwargs = kwargs | {"pin_memory": False}
        host = False
        if target is not None and target.type in ("cuda", "meta"):
            # C++ asks for what it takes a tensor's device to be.
            kwargs = kwargs | {"device": CUDA if self.strict else META}
            on_device = True
        elif not self.strict and not on_device:
            host = self._is_host_call(given, args, kwargs)
            if host and target is not None:
                kwargs = kwargs | {"device": META}
        if name == "inductor.resize_storage_bytes_" and on_device:
            return self._resize(*args)
        if self.strict and on_device:
            self._check(name, given)
        self._running = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._running = False
        self._record(name, func, args, given, result, host)
        return result

    def _record(
        self, name: str, func: Any, args: Any, given: list[Tensor], result: Any, host: bool
    ) -> None:
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            if host:
                self._see_host(tensor)
            elif tensor.is_cuda:
                self._see(tensor)
        if name in _UNEQUAL:
            setattr(result, UNEQUAL, True)
        on_device = not host and any(t.is_cuda for t in (*made, *given))
        if not on_device or name in NO_KERNEL or func.is_view:
            return
        self.phase.kernels[name] += 1
        self.phase.flops += flops(name, args)
        extra = workspace(name, args)
        if extra:
            self._take_workspace(extra)

    def _take_workspace(self, size: int) -> None:
        """A kernel's own memory, for as long as it runs."""
        size, key = rounded(size), self._key()
        self.events += [(size, key), (-size, key)]
        if self.now + size > self.phase.peak:
            self._note(size)

    def _see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor on the device, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = (self.name, 0, 0)
        self._set_size(key, rounded(storage.nbytes()))
        weakref.finalize(storage, self._gone, key).atexit = False

    def _set_size(self, key: int, size: int) -> None:
        """Free what a storage has, and allocate its new size."""
        phase, had, number = self._live[key]
        if had:
            self.events.append((-had, number))
        number = self._key()
        self._live[key] = (phase, size, number)
        self._by[phase] += size - had
        self.now += size - had
        if size:
            self.events.append((size, number))
        if self.now > self.phase.peak:
            self._note()

    def _resize(self, tensor: Tensor, size: int) -> None:
        """A storage is freed, or allocated again, under a tensor that stays."""
        self._see(tensor)
        self._set_size(tensor.untyped_storage()._cdata, rounded(size))

    def _gone(self, key: int) -> None:
        self._set_size(key, 0)
        del self._live[key]

    def _note(self, extra: int = 0) -> None:
        """Keep this moment as the phase's fullest, if it is."""
        if self.now + extra < self.phase.peak:
            return
        self.phase.peak = self.now + extra
        self.phase.peak_by = {name: size for name, size in self._by.items() if size}
        if extra:
            self.phase.peak_by["inside the kernel"] = extra
        self.phase.peak_operator, self.phase.peak_where = self._operator, caller()

    def _key(self) -> int:
        self._keys += 1
        return self._keys

    # The host's memory
    def _to_host(self, source: Tensor, kwargs: Any) -> Tensor:
        """What a copy to the host gives: ones, or no data where that would be much."""
        self.wait("copy to the host")
        self.phase.kernels["copy to the host"] += 1
        dtype = kwargs.get("dtype") or source.dtype
        size = source.numel() * dtype.itemsize
        if size <= REAL_BYTES:
            with _real():
                return torch.ones(source.shape, dtype=dtype)
        if self.strict:
            return torch.empty(source.shape, dtype=dtype, device="cpu")
        copy = torch.empty(source.shape, dtype=dtype, device=META)
        self._see_host(copy)
        return copy

    def _is_host_call(self, given: list[Tensor], args: Any, kwargs: Any) -> bool:
        """Whether an operator is of tensors without data that stand for the host's."""
        if self.host and any(self._stands_for_host(t) for t in given if _is_meta(t)):
            return True
        if not self.host_factories or given or kwargs.get("device") is None:
            return False
        shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return math.prod(shape) * dtype.itemsize > REAL_BYTES

    def _see_host(self, tensor: Tensor) -> None:
        if not _is_meta(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.host:
            return
        self.host.add(key)
        self.host_now += storage.nbytes()
        self.phase.host_peak = max(self.phase.host_peak, self.host_now)
        weakref.finalize(storage, self._gone_host, key, storage.nbytes()).atexit = False

    def _gone_host(self, key: int, size: int) -> None:
        self.host.discard(key)
        self.host_now -= size

    # Messages and devices
    def _message(self, name: str, args: Any) -> Any:
        group, sizes = "other", [0]
        for argument in args:
            if isinstance(argument, torch.ScriptObject):
                group = self._group(argument) or group
            else:
                leaves = [t for t in tree_leaves(argument) if isinstance(t, Tensor)]
                sizes.append(sum(t.numel() * t.element_size() for t in leaves))
        entry = self.phase.messages.setdefault((name.removeprefix("c10d."), group), [0, 0])
        entry[0] += 1
        entry[1] += max(sizes)
        if name == "c10d.allgather_":
            self._take_workspace(max(sizes))  # NCCL gathers into one tensor, and copies from it
        work = FakeWork().boxed()
        return work if "coalesced" in name or name in _ONLY_WORK else (args[0], work)

    def _group(self, argument: Any) -> str | None:
        try:
            return self.groups.get(dist.ProcessGroup.unbox(argument).group_name)
        except RuntimeError:  # another object than a process group
            return None

    def _check(self, name: str, given: list[Tensor]) -> None:
        """Count an operator whose operands are on two devices; a number is no operand."""
        if name in DEVICE_COPIES or name in MIXED_ALLOWED:
            return
        if not all(t.is_cuda for t in given):
            devices = ", ".join(t.device.type for t in given)
            self.phase.mixed[f"{name}({devices}) in {caller()}"] += 1


def _is_meta(tensor: Tensor) -> bool:
    return bool(tensor.is_meta)


@contextmanager
def _real() -> Iterator[None]:
    """Within it a new tensor has data."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


_HERE = str(Path(__file__).parent)
_SKIPPED = (_HERE, str(Path(torch.__file__).parent))


def caller() -> str:
    """The function of the program, outside of torch and of this package, that runs now."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_SKIPPED) and not file.startswith("<"):
            return f"{frame.f_code.co_name} ({Path(file).name})"
        frame = frame.f_back
    return "?"


def group_names() -> dict[str, str]:
    """Megatron-core's process groups by torch's names for them."""
    from megatron.core import parallel_state as state

    found: dict[str, str] = {}
    for name, get in (
        ("tensor", state.get_tensor_model_parallel_group),
        ("pipeline", state.get_pipeline_model_parallel_group),
        ("data", lambda: state.get_data_parallel_group(with_context_parallel=True)),
        ("embedding", lambda: state.get_embedding_group(check_initialized=False)),
        ("model", state.get_model_parallel_group),
        ("all", lambda: dist.group.WORLD),
    ):
        group = get()
        if group is not None:
            found.setdefault(group.group_name, name)
    return found
