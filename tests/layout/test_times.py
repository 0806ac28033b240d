"""The time model: products as published, and the longer of device and host."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import DEVICES, SOURCES, Device, device_named
from keel_megatron.layout.host_times import Calibration, calibration
from keel_megatron.layout.times import (
    SLOW_HOST,
    HostTimes,
    Load,
    Times,
    UnitTimes,
    attention_fraction,
    host_times,
    predicted_times,
    spread,
    time_parts,
)
from keel_megatron.layout.work import Costs, Execution, Work
from tests.layout.test_costs import PAPER
from tests.settings import small_config

H200 = DEVICES["h200"]
GPUS = [device for device in DEVICES.values() if device.name != "cpu"]
PUBLISHED = Path(__file__).with_name("h100_products.json")


def costs_of(**overrides: Any) -> Costs:
    return model_costs(small_config(**{**PAPER, **overrides}))


def test_products_take_the_published_times() -> None:
    """44 products of an H100 between 1024^3 and 4 x 4096^3, each within 10 %."""
    rows = json.loads(PUBLISHED.read_text())["products"]
    assert len(rows) == 44
    squares = []
    for batches, m, n, k, tflops in rows:
        flops = 2.0 * batches * m * n * k
        work = Work(flops=flops, products=1, results=batches * m * n)
        found = time_parts(work, DEVICES["h100"], Execution())["products"]
        squares.append((found * tflops * 1e12 / flops - 1.0) ** 2)
    assert max(squares) ** 0.5 < 0.1
    assert (sum(squares) / len(squares)) ** 0.5 < 0.03


def test_a_blocks_products_are_counted_with_their_results() -> None:
    t, h, f, g = 4096, 1024, 3072, 512
    block, head = costs_of().block, costs_of(kernels__logits_mib=512.0).head
    assert (block.forward.products, block.backward.products) == (4, 8)
    assert block.forward.results == t * ((h + 2 * g) + h + 2 * f + h)
    weights = h * (h + 2 * g) + h * h + h * 2 * f + f * h
    assert block.backward.results == t * (h + h + h + f) + weights
    # Four pieces, each multiplied again; the input's gradients, and one of the weight a piece.
    v = PAPER["data__vocab_size"]
    assert (head.forward.products, head.backward.products) == (4, 12)
    assert head.backward.results == t * v + t * h + 4 * v * h


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_every_gpus_rates_are_sound_and_have_a_source(device: Device) -> None:
    assert 0.7 < device.measured_tflops / device.tflops < 1.0
    assert device.measured_tflops <= device.tflops * device.matmul_fraction * 1.001
    best = max(device.cudnn_fraction, device.flash_fraction)
    assert best < device.matmul_fraction
    chosen = attention_fraction(device, Execution(attention="auto"))
    assert chosen == best  # the default kernel is the faster one
    for name, text in SOURCES.items():
        assert getattr(device, name) > 0.0
        assert "published" in text or "estimate" in text


def test_attention_is_that_of_the_chosen_kernel() -> None:
    """`kernels.attention`; auto: cuDNN on Hopper for lengths that it supports."""

    def kernel(**overrides: Any) -> str:
        return costs_of(**overrides).block.execution.attention

    assert kernel() == "auto"
    assert kernel(kernels__attention="flash") == "flash"
    assert kernel(data__seq_length=4000) == "flash"
    assert kernel(kernels__attention="cudnn", data__seq_length=4000) == "cudnn"
    for name, default in (("h200", "cudnn"), ("b200", "cudnn"), ("a100", "flash")):
        device = DEVICES[name]
        auto = attention_fraction(device, Execution(attention="auto"))
        assert auto == getattr(device, f"{default}_fraction")
    auto, flash = (
        predicted_times(costs_of(kernels__attention=way), H200).block for way in ("auto", "flash")
    )
    assert auto.forward < flash.forward


def test_the_longer_of_device_and_host_counts() -> None:
    host = HostTimes(Times(2.0, 3.0), chunk=Times(1.0, 1.0), end=Times(7.0, 7.0), light=0.5)
    times = UnitTimes(Times(1.0, 1.0), Times(1.0, 1.0), Times(40.0, 50.0), light=0.25, host=host)
    blocks = times.of(Load(4, full=1, light=2, chunks=2))
    assert blocks.device == Times(4.0, 4.0 + 1.0 + 0.5)
    assert blocks.host == Times(8.0 + 2.0, 12.0 + 2.0 + 2.0 + 1.0)
    assert (blocks.bound, blocks.longer) == ("host", blocks.host)
    assert times.of(Load(4, embedding=True, head=True)).host == Times(8.0 + 15.0, 12.0 + 15.0)
    # The host launches the blocks while the device is busy with the head.
    last = times.of(Load(4, head=True))
    assert (last.bound, last.longer) == ("device", last.device)
    measured = replace(times, host=None).of(Load(4))
    assert (measured.bound, measured.longer) == ("device", Times(4.0, 4.0))


def test_the_hosts_time_is_python_and_launches() -> None:
    costs, found = costs_of(), calibration()
    python, forward = found.block("keel", compiled=False), costs.block.forward
    times = host_times(costs, H200)
    assert times.block.forward == pytest.approx(python.forward + 5e-6 * forward.kernels)
    slow = host_times(costs, device_named("h200", python_scale=2.0, kernel_launch_us=10.0))
    assert slow.block.total == pytest.approx(2 * times.block.total)
    assert slow.end.total == pytest.approx(2 * times.end.total)
    assert slow.chunk.total == pytest.approx(2 * times.chunk.total)
    compiled = host_times(costs_of(kernels__compile=True), H200)
    assert compiled.block.total < times.block.total
    graphed = host_times(costs_of(kernels__cuda_graphs=True), H200)
    assert graphed.block.total == 0.0 < graphed.end.total
    # Of larger micro-batches the host launches as much.
    assert host_times(costs_of(training__micro_batch_size=4), H200).block == times.block


def test_a_slower_host_never_makes_a_step_faster() -> None:
    load, previous = Load(64, True, True), 0.0
    for scale in (0.25, 0.5, 1.0, 2.0, 4.0):
        device = device_named("h200", python_scale=scale)
        found = predicted_times(costs_of(), device).of(load).longer.total
        assert found >= previous
        previous = found
    assert predicted_times(costs_of(), device).of(load).bound == "host"
    fast = spread(costs_of(), device_named("h200", python_scale=0.25), load)
    slow = spread(costs_of(), device_named("h200", python_scale=1.0), load)
    assert fast.high < slow.high
    # The slowest measured host is in the range, and is all of it where the host is the limit.
    bound = spread(costs_of(), device_named("h200", python_scale=4.0), load)
    assert bound.high == pytest.approx(SLOW_HOST, rel=0.05)


def test_on_a_cpu_host_and_device_are_one() -> None:
    assert predicted_times(model_costs(small_config(), "torch"), DEVICES["cpu"]).host is None


def test_the_calibration_is_read_from_its_file() -> None:
    found = calibration()
    assert isinstance(found, Calibration)
    assert found.machine
    assert found.date >= "2026-11-26"
    for times in (*found.blocks.values(), found.ends, found.compiled):
        assert 2e-5 < times.forward < 5e-3
        assert 2e-5 < times.backward < 5e-3
    assert 0.0 < found.chunk.forward + found.chunk.backward < 5e-3
    assert 0.3 < found.compiled_ratio < 1.0
    eager, compiled = (found.block("pre_ln", compiled=way) for way in (False, True))
    assert compiled.forward / eager.forward == pytest.approx(
        found.compiled.forward / found.blocks["keel"].forward
    )
