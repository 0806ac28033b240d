"""`keel bench`: what it measures adds up, and what it is asked wrongly it says."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import yaml
from keel_megatron.bench import step_time
from keel_megatron.bench.step_bench import run_bench
from keel_megatron.bench.step_report import report, summary
from keel_megatron.bench.step_time import (
    PARTS,
    PredictedPasses,
    Roofline,
    Samples,
    measure_roofline,
    time_steps,
)
from keel_megatron.bench.timers import PartTimers
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.config import load_config
from keel_megatron.errors import UserError
from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.stages import partition
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.integration.commands import keel

SECTIONS = {
    "model": {"blocks": 4, "hidden_size": 32, "ffn_hidden_size": 96, "num_attention_heads": 2},
    "parallel": {"pipeline": 2},
    "data": {"seq_length": 32, "vocab_size": 512},
    "optimizer": {"learning_rate": 1e-3},
    "training": {
        "name": "bench",
        "steps": 10,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "threads": 1,
    },
    "tracking": {"mlflow": False},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(SECTIONS))
    return file


def test_two_rules_are_timed_in_turn(path: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    command = ["bench", str(path), "--processes", "2"]
    command += ["--random-tokens", "--compare", "model.residual=pre_ln,keel", "--steps", "6"]
    command += ["--out", str(out), "--profile", str(trace), "checkpoint.every=5"]
    with socket.create_server(("127.0.0.1", 0)) as server:  # a team's: it is to hear nothing
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        command += ["tracking.mlflow=true", f"tracking.uri={uri}"]
        done = keel(tmp_path, *command)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert [one["name"] for one in figures["variants"]] == ["pre_ln", "keel"]
    for one in figures["variants"]:
        assert one["steps"] == 6
        for part in ("forward", "backward", "pipeline messages", "optimizer"):
            assert one["parts"][part]["mean"] > 0.0
        assert one["checkpoint_stall_seconds"] > 0.0
        assert 0.0 < one["mfu"] < 1.0
        assert one["attention"] == "torch's flash kernel for CPUs"
        assert one["host_seconds"] == pytest.approx(one["passes_seconds"], rel=0.2)
    assert "that of the passes: a CPU launches nothing" in done.stdout
    assert "keel" in done.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    assert not (tmp_path / "runs").exists()


def timed(path: Path) -> list[tuple[float, float]]:
    """Each step's time on this rank, and the sum of its parts."""
    config = load_config(path, world_size=2)
    with start(config.parallel, config.training) as runtime:
        (found,) = time_steps(
            {"run": config}, runtime, warmup=1, steps=2, datasets=None, say=lambda _text: None
        )
    return [
        (step, sum(values))
        for step, *values in zip(found.steps, *found.parts.values(), strict=True)
    ]


def test_the_parts_of_a_step_add_up(path: Path) -> None:
    for steps in run_ranks(2, timed, path):
        for step, parts in steps:
            assert parts == pytest.approx(step, rel=1e-6)


def folders_of_saves(path: Path, overrides: list[str]) -> list[str]:
    """Where this rank, on a host of its own, saves; each host has a temporary folder of its own."""
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        host = f"host-{os.environ['RANK']}"
        patch.setattr(socket, "gethostname", lambda: host)
        (path.parent / host).mkdir()
        patch.setattr(tempfile, "tempdir", str(path.parent / host))
        whole = Saver.save

        def save(self: Saver, *arguments: Any) -> None:
            saved.append(str(self._config.training.folder))
            whole(self, *arguments)

        patch.setattr(Saver, "save", save)
        try:
            run_bench(path, overrides, None, warmup=0, steps=2, random_tokens=True)
        except UserError as error:
            saved.append(str(error))
    return saved


def test_nodes_save_where_all_of_them_can(path: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    ranks = run_ranks(
        2, folders_of_saves, path, ["checkpoint.every=1", f"training.runs_dir={shared}"]
    )
    assert ranks[0] == ranks[1]
    ((folder,), _) = ranks
    assert Path(folder).is_relative_to(shared)
    assert list(shared.iterdir()) == []


def test_nodes_that_cannot_save_are_told(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for said in run_ranks(
        2, folders_of_saves, path, ["checkpoint.every=1", f"training.runs_dir={tmp_path}/file"]
    ):
        assert said[0].startswith("training.runs_dir: checkpoints of several nodes need")


def test_a_comparison_needs_two_values_of_one_layout(path: Path) -> None:
    def bench(compare: str, *overrides: str) -> None:
        run_bench(
            path, list(overrides), compare, warmup=1, steps=4, random_tokens=True, profile=None
        )

    with pytest.raises(UserError, match="two values or more"):
        bench("model.residual=keel", "parallel.pipeline=1")
    with pytest.raises(UserError, match=r"training\.threads must be the same"):
        bench("training.threads=1,2", "parallel.pipeline=1")


def test_the_timers_take_megatrons_spans() -> None:
    timers = PartTimers(torch.device("cpu"))
    timers("forward-backward", log_level=1).start(barrier=True)
    for name, seconds in (("forward-compute", 0.02), ("forward-send-backward-recv", 0.03)):
        timers(name, log_level=2).start()
        time.sleep(seconds)
        timers(name).stop()
    time.sleep(0.01)
    timers("forward-backward").stop()
    found = timers.take()
    assert found["forward"] >= 0.02
    assert found["pipeline messages"] >= 0.03
    assert found["schedule"] >= 0.01
    assert found["passes"] == pytest.approx(sum(v for k, v in found.items() if k != "passes"))
    assert set(found) - {"passes"} <= set(PARTS)
    assert not any(timers.take().values())


class Event:
    """A CUDA event on a device that needs 40 ms more for everything."""

    def __init__(self, enable_timing: bool) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.seconds - self.seconds) + 40.0


def test_host_time_is_apart_from_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: time.sleep(0.1))
    timers = PartTimers(torch.device("cuda"))
    timers("forward-backward").start()
    timers("forward-compute").start()
    time.sleep(0.02)
    timers("forward-compute").stop()
    timers("forward-backward").stop()
    found = timers.take()
    assert timers.host_seconds >= 0.02
    assert found["passes"] == pytest.approx(timers.host_seconds + 0.04, abs=0.01)
    timers.take()
    assert timers.host_seconds == 0.0


def test_the_report_shows_both_times_of_a_gpu(path: Path) -> None:
    config = load_config(path, world_size=2)
    parts = {part: [0.1, 0.1] for part in PARTS}
    samples = Samples("keel", config, [1.0, 1.0], parts, losses=[7.0], on_host=False)
    samples.host, samples.passes, samples.attention = [0.5, 0.5], [0.8, 0.8], "cuDNN's kernel"
    roofline = Roofline(1.0, 1.0)
    text = "\n".join(report([summary([samples], roofline)], roofline, "here"))
    assert re.search(r"passes, ms on the device +800\.0", text)
    assert re.search(r"until the host's last launch +500\.0", text)
    assert re.search(r"bound by +device", text)
    assert re.search(r"predicted: device, host, ms +-", text)
    samples.host = [0.79, 0.79]
    samples.predicted = PredictedPasses(0.7, 0.75, "host")
    found = summary([samples], roofline)
    assert found["predicted"] == {"device": 0.7, "host": 0.75, "bound": "host"}
    text = "\n".join(report([found], roofline, "here"))
    assert re.search(r"bound by +host", text)
    assert re.search(r"predicted: device, host, ms +700\.0, 750\.0: host", text)
    assert re.search(r"attention +cuDNN's kernel", text)


def test_a_bench_on_a_gpu_states_the_plans_times(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all micro-batches on the slowest stage; nothing on a CPU."""
    config = load_config(path, world_size=2)
    for device in (DEVICES["h200"], DEVICES["cpu"]):
        parts = partition(config, 1, device)
        monkeypatch.setattr(step_time, "own_partition", lambda *_, parts=parts: parts)
        found = PredictedPasses.of(config, None, 4)  # type: ignore[arg-type]
        times = parts.slowest.times
        if device.name == "cpu":
            assert found is None
        else:
            assert found == PredictedPasses(
                4 * times.device.total, 4 * times.host.total, times.bound
            )


def test_the_roofline_is_that_of_a_product_and_a_copy() -> None:
    roofline = measure_roofline(torch.device("cpu"), torch.float32)
    assert 1e-3 < roofline.tflops < 1e3
    assert 0.1 < roofline.bandwidth_gb < 1e4
