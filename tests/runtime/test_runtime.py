"""Devices, seeds, process groups: what a rank is told, and how waiting ends."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.device import Launch, choose_device
from keel_megatron.runtime.seeds import derive_seed
from tests.distributed import run_ranks
from tests.settings import settings


def test_a_seed_depends_on_its_purpose_alone() -> None:
    """The golden value is what Python's hashlib gave for "1234/weight/a" on 2026-11-24."""
    digest = hashlib.sha256(b"1234/weight/a").digest()
    assert derive_seed(1234, "weight", "a") == int.from_bytes(digest[:8], "big") // 2
    assert derive_seed(1234, "weight", "a") == 734131588244179554
    assert len({derive_seed(s, p) for s in (1, 2) for p in ("a", "b")}) == 4


def test_cuda_is_not_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(UserError, match=r"training.device: cuda is set, but torch finds no"):
        choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match=r"there are 2: start at most 2 processes per node"):
        choose_device("auto", 2)


def test_a_launch_is_read_from_torchruns_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Launch.from_environment() == Launch(0, 1, 0, 1)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(1, 4, 1, 2)


WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"RANK": "five"}, "RANK='five' must be an integer"),
        ({"RANK": ""}, "RANK='' must be an integer"),
        ({"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "RANK=1 must be below WORLD_SIZE=0"),
        ({"WORLD_SIZE": None}, "RANK=1 must be below WORLD_SIZE=1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 must be below WORLD_SIZE + 1=5"),
        ({"RANK": None, "MASTER_PORT": None}, "WORLD_SIZE=4 needs RANK, MASTER_PORT too"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 must be from 1 to 65535"),
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT='29500x' must be an integer"),
    ],
)
def test_odd_variables_are_one_message(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], expected: str
) -> None:
    for name, value in (WHOLE | change).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    with pytest.raises(UserError, match=re.escape(f"environment variable {expected}; start")):
        Launch.from_environment()


def place(sections: dict) -> tuple:
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        flags = (runtime.any(runtime.rank == 2), runtime.any(False))
        largest = runtime.max(75 if runtime.rank == 2 else 0)
        told = runtime.from_main(lambda: f"made on {runtime.rank}")
        try:
            runtime.from_main(lambda: complain("wrong text"))
            complaint = None
        except UserError as error:
            complaint = (str(error), error.reported)
        return (
            (runtime.tensor_rank, runtime.pipeline_rank, runtime.data_rank),
            (*flags, largest),
            told,
            complaint,
        )


def complain(text: str) -> None:
    raise UserError(text)


def test_ranks_find_their_place_and_agree() -> None:
    found = run_ranks(4, place, settings(parallel__tensor=2, parallel__pipeline=2))
    assert [row[0] for row in found] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert all(row[1] == (True, False, 75) for row in found)
    assert all(row[2] == "made on 0" for row in found)
    assert [row[3] for row in found] == [("wrong text", rank != 0) for rank in range(4)]


def wait_in_vain(sections: dict) -> str:
    """Rank 1 stays away from a barrier; rank 0 must say that it waited, and who it is.

    The groups have the setting's time-out, which a start on a busy machine needs; the barrier that
    is to fail has a short one.
    """
    from keel_megatron.runtime.distributed import CollectiveTimeoutError, start

    config = RunConfig.model_validate(sections)
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    try:
        with start(config.parallel, config.training) as runtime:
            group = dist.group.WORLD
            assert group is not None
            set_for = group._get_backend(runtime.device).options._timeout
            assert set_for == timedelta(seconds=config.parallel.timeout_seconds)
            if runtime.rank == 1:
                store.wait(["rank 0 is done"], timedelta(seconds=300))
                return "stayed away"
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
            runtime.barrier()
    except CollectiveTimeoutError as error:
        return str(error)
    finally:
        store.set("rank 0 is done", "")
    return "no time-out"


def test_a_collective_that_never_completes_names_the_rank() -> None:
    sections = settings(parallel__pipeline=2, parallel__timeout_seconds=200.0)
    waited, _away = run_ranks(2, wait_in_vain, sections)
    assert waited.startswith("rank 0 (pipeline stage 0, tensor rank 0, replica 0) waited more than")
    assert "parallel.timeout_seconds = 200" in waited


def test_torch_itself_is_left_alone_on_a_cpu() -> None:
    """Only Megatron-core's modules see the substitute; what they see stays on the CPU."""
    probe = """
import torch
before = torch.cuda.current_device, torch.zeros
from keel_megatron.compat import cpu
cpu.install(); cpu.install()
assert (torch.cuda.current_device, torch.zeros) == before
from megatron.core.optimizer import clip_grads
assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
assert clip_grads.torch.cuda.current_device() == torch.device("cpu")
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).cuda().device.type == "cpu"
assert torch.ones(1).type(torch.int64).dtype == torch.int64
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", probe], check=True)
