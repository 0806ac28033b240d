"""Process groups on CUDA, with stand-ins for what needs a device."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from keel_megatron.errors import UserError
from keel_megatron.runtime import distributed
from keel_megatron.runtime.device import Launch
from tests.settings import small_config


class StopError(Exception):
    """Ends what is tested where CUDA would begin."""


def test_cuda_has_no_groups_that_nothing_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gloo group is a mesh of connections between all replicas, on the host's network."""
    given: dict[str, Any] = {}

    def initialize(**settings: Any) -> None:
        given.update(settings)
        raise StopError

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize)
    device = torch.device("cuda", 0)
    with pytest.raises(StopError):
        distributed.model_parallel(small_config().parallel, Launch(0, 1, 0, 1), device, 1)
    assert given["create_gloo_process_groups"] is False


@pytest.fixture
def taken_down(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the process group of a made-up CUDA device was taken down."""
    found: list[str] = []
    for name in ("_init_process_group", "set_cuda_numerics", "seed_dropout"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)
    place = SimpleNamespace(pipeline_rank=0, data_rank=0, describe=lambda: "rank 0")
    monkeypatch.setattr(distributed, "model_parallel", lambda *_: place)
    monkeypatch.setattr(distributed, "choose_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(distributed, "_take_down", lambda: found.append("destroyed"))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda: found.append("aborted")
    )
    return found


def run(error: BaseException | None) -> None:
    config = small_config()
    with distributed.start(config.parallel, config.training, Launch(0, 1, 0, 1)):
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "destroyed"),
        # All ranks raise it together: the message that told them is still to be delivered.
        (UserError("the text is not there"), "destroyed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "aborted"),
        (RuntimeError("NCCL: connection closed"), "aborted"),
        (SystemExit(143), "aborted"),
    ],
)
def test_an_error_on_cuda_does_not_wait_for_the_other_ranks(
    taken_down: list[str], error: BaseException | None, expected: str
) -> None:
    if error is None:
        run(None)
    else:
        with pytest.raises((type(error), distributed.CollectiveTimeoutError)):
            run(error)
    assert taken_down == [expected]


def test_an_abort_that_hangs_does_not_keep_the_error(
    taken_down: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(distributed, "_ABORT_SECONDS", 0.1)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", never.wait)
    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    never.set()
    assert taken_down == []
