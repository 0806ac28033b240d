"""A clock that goes by what is done and not by the hour: a busy machine does not change it.

Every rank has its own. What a rank does adds to it (`VirtualClock.add`, or all work of torch's
operators, `Work`), and a pipeline message sets it forward: the message passes once both ends have
offered it and takes its link's time, and who waits for it is then that late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class VirtualClock:
    """One rank's clock.

    Args:
        store: shared by the ranks, for this clock alone.
        link: time of a message from stage i to its next one, and back.
    """

    def __init__(self, store: Any = None, link: Sequence[float] = ()) -> None:
        self.now = 0.0
        self._store, self._link = store, link
        self._counts: dict[str, int] = {}

    def __call__(self) -> float:
        return self.now

    def add(self, time: float) -> None:
        self.now += time

    @contextmanager
    def on_messages(self) -> Iterator[None]:
        """Within it Megatron-core's pipeline messages set this clock."""
        from megatron.core.pipeline_parallel import p2p_communication as p2p

        whole = p2p._batched_p2p_ops, p2p._p2p_ops
        p2p._batched_p2p_ops, p2p._p2p_ops = map(self._timed, whole)
        try:
            yield
        finally:
            p2p._batched_p2p_ops, p2p._p2p_ops = whole

    def _timed(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def requests(**arguments: Any) -> Any:
            made = make(**arguments)
            # As p2p_communication lists them.
            names = [
                name
                for name in ("send_prev", "recv_prev", "send_next", "recv_next")
                if arguments[f"tensor_{name}"] is not None
            ]
            named = made if isinstance(made, dict) else dict(zip(names, made, strict=True))
            timed = {name: self._request(name, named[name], arguments) for name in names}
            return timed if isinstance(made, dict) else list(timed.values())

        return requests

    def _request(self, name: str, request: Any, arguments: dict[str, Any]) -> _Request:
        ends = {"next": arguments["next_pipeline_rank"], "prev": arguments["prev_pipeline_rank"]}
        me, (what, side) = arguments["group"].rank(), name.split("_")
        stages = list(torch.distributed.get_process_group_ranks(arguments["group"]))
        other = stages.index(ends[side])
        towards = side if what == "send" else {"next": "prev", "prev": "next"}[side]
        sender, receiver = (me, other) if what == "send" else (other, me)
        key = f"{towards}/{sender}"
        self._counts[key] = self._counts.get(key, 0) + 1
        key += f"/{self._counts[key]}"
        link = self._link[sender if towards == "next" else receiver] if self._link else 0.0
        self._store.set(f"{key}/{what}", repr(self.now))
        return _Request(self, request, f"{key}/{'recv' if what == 'send' else 'send'}", link)

    def arrived(self, offered: float, key: str, link: float) -> None:
        """Wait for a message: this end offered it then, the other one when it says."""
        self.now = max(self.now, max(offered, float(self._store.get(key))) + link)


class _Request:
    """A message on its way."""

    def __init__(self, clock: VirtualClock, request: Any, key: str, link: float) -> None:
        self._clock, self._request, self._key, self._link = clock, request, key, link
        self._offered = clock.now

    def wait(self) -> None:
        self._request.wait()
        self._clock.arrived(self._offered, self._key, self._link)


class Work(TorchDispatchMode):
    """Within it a clock goes on by the work of torch's operators.

    An operator's is the elements that it takes and gives; a matrix product's also its additions.
    """

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        work = sum(tensor.numel() for tensor in tensors)
        if func.overloadpacket in _PRODUCTS:
            a, b = args[-2:]
            work += a.numel() * b.shape[-1]
        self._clock.add(work)
        return result


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
