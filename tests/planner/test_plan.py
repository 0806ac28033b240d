"""The plan of a run: its figures by hand, its golden sizes, and the paper's recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.config import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import Device, device_named
from keel_megatron.layout.times import Times, UnitTimes
from keel_megatron.planner.advice import smallest_change
from keel_megatron.planner.communication_volume import gradient_seconds, link_seconds, message_bytes
from keel_megatron.planner.plan import Measured, Plan, make_plan
from keel_megatron.planner.report import describe, duration, seconds, si
from keel_megatron.planner.simulate import MemoryTrace, Timeline
from tests.settings import small_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "yaml" / "paper").glob("*.yaml"))
H200, CPU = device_named("h200"), device_named("cpu")


def deep(*overrides: str) -> RunConfig:
    return load_config(ROOT / "yaml" / "paper" / "keel_1024.yaml", overrides)


def measured(block: float, head: float = 0.0, embedding: float = 0.0) -> Measured:
    """A third of each forward; the update takes nothing."""

    def times(total: float) -> Times:
        return Times(total / 3, 2 * total / 3)

    return Measured(UnitTimes(times(embedding), times(block), times(head)), 0.0, 0.0)


def test_every_recipe_is_there() -> None:
    assert {path.stem for path in RECIPES} == {
        "keel_64",
        "keel_128",
        "keel_512",
        "keel_1024",
        "wide_128",
        "fineweb_edu_10b",
        "fineweb_edu_40b",
    }


@pytest.mark.parametrize("gpus", [8, 64, 512, 1024])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_plan(path: Path, gpus: int) -> None:
    config = load_config(path, world_size=gpus)
    plan = make_plan(config, gpus, H200)
    assert plan.fits
    assert sum(stage.blocks for stage in plan.partition.stages) == config.model.blocks
    assert 0.04 < plan.mfu < 0.6


@pytest.mark.parametrize(
    ("name", "blocks", "body"),
    [
        ("keel_64", 32, 0.4e9),
        ("keel_128", 64, 0.8e9),
        ("keel_512", 256, 3.22e9),
        ("keel_1024", 512, 6.44e9),
        ("wide_128", 64, 3.22e9),
        ("fineweb_edu_10b", 256, 3.22e9),
    ],
)
def test_the_recipes_are_of_the_papers_sizes(name: str, blocks: int, body: float) -> None:
    """3.2 B and 6.4 B are the paper's, without embeddings; the stages hold the same."""
    config = load_config(ROOT / "yaml" / "paper" / f"{name}.yaml")
    plan = make_plan(config, config.parallel.model_parallel_size, H200)
    assert config.model.blocks == blocks
    tables = 2 * config.data.vocab_size * config.model.hidden_size
    assert plan.parameters - tables == pytest.approx(body, rel=0.01)
    assert sum(stage.parameters for stage in plan.partition.stages) == plan.parameters


def test_the_recipes_tokens_are_the_papers() -> None:
    tokens = {
        path.stem: config.training.steps
        * config.training.global_batch_size
        * config.data.seq_length
        for path in RECIPES
        for config in [load_config(path)]
    }
    for name, count in tokens.items():
        stated = {"fineweb_edu_10b": 10e9, "fineweb_edu_40b": 40e9, "wide_128": 250e9}
        assert count == pytest.approx(stated.get(name, 190e9), rel=1e-3)


def test_the_head_of_a_large_vocabulary_costs_as_much_as_many_blocks() -> None:
    """By arithmetic: 2 h V beside 2 h (48 x 64) + 6 h f + scores, about 5 blocks at 128,000."""
    times = make_plan(deep(), 8, H200).partition.times
    assert 4.5 < times.head.total / times.block.total < 6
    small = make_plan(deep("data.vocab_size=32000"), 8, H200).partition.times
    assert small.head.total / small.block.total < 0.3 * times.head.total / times.block.total
    assert "the head as long as" in describe(make_plan(deep(), 8, H200))


def test_a_plan_by_hand() -> None:
    """Two even stages, 8 micro-batches, a block of 3 s: (8 + 1) x 2 blocks x 3 s."""
    config = small_plan_config()
    free = device_named("cpu", intra_node_gb=1e30, intra_node_latency_us=1e-30)
    plan = make_plan(config, 2, free, measured(block=3.0))
    assert plan.micro_batches == 8
    assert plan.step_seconds == pytest.approx((8 + 1) * 2 * 3.0)
    assert plan.bubble == pytest.approx(1 / 8)
    assert plan.tokens_per_second == pytest.approx(16 * 32 / 54.0)
    flops = training_flops_per_token(config.model, 32, 512) * 16 * 32
    assert plan.mfu == pytest.approx(flops / (54.0 * 2 * free.tflops * 1e12))
    assert plan.days == pytest.approx(4 * 54.0 / 86400)


def test_a_batch_size_ramp_up_by_hand() -> None:
    """Three steps of 2 micro-batches and one of 4, of two even stages."""
    ramp = {"start": 4, "increment": 4, "samples": 32}
    config = small_plan_config(schedule__rampup_batch_size=ramp)
    free = device_named("cpu", intra_node_gb=1e30, intra_node_latency_us=1e-30)
    plan = make_plan(config, 2, free, measured(block=3.0))
    assert plan.step_seconds == pytest.approx((8 + 1) * 6.0)
    assert plan.run_seconds == pytest.approx(3 * (2 + 1) * 6.0 + (4 + 1) * 6.0)
    assert plan.as_object()["tokens"] == 20 * 32
    text = describe(plan)
    assert "Run: 4 steps, 640 tokens: 1.4 minutes." in text
    assert "Batch: from 4 sequences to 8 over the first 4 steps (640 tokens)" in text
    assert plan.as_object()["days"] == pytest.approx(84 / 86400)


def small_plan_config(**overrides: Any) -> RunConfig:
    """Overrides without a section are of `parallel`."""
    named = {key if "__" in key else f"parallel__{key}": overrides[key] for key in overrides}
    return small_config(model__blocks=4, **{"parallel__pipeline": 2, **named})


def test_recomputation_takes_one_more_forward_pass() -> None:
    plain = make_plan(small_plan_config(), 2, CPU, measured(block=3.0))
    again = make_plan(small_plan_config(recompute="full"), 2, CPU, measured(block=3.0))
    assert again.times.backward[0] == pytest.approx(plain.times.backward[0] + 2 * 1.0)
    assert again.times.forward == plain.times.forward


def test_chunks_get_their_own_times() -> None:
    config = small_plan_config(virtual_pipeline=2, layout=[1, 2, 1, 0])
    plan = make_plan(config, 2, CPU, measured(block=3.0, head=30.0, embedding=0.3))
    assert plan.times.forward == pytest.approx((1.1, 2.0, 1.0, 10.0))
    assert plan.times.backward == pytest.approx((2.2, 4.0, 2.0, 20.0))


def test_a_measured_update_is_the_slowest_stages() -> None:
    config = small_plan_config(layout=[3, 1])
    times = measured(block=3.0).times
    plan = make_plan(config, 2, CPU, Measured(times, update_block=0.5, update_embedding=0.25))
    assert plan.closing_seconds == pytest.approx(3 * 0.5 + 0.25)
    assert "parallel.layout=" not in describe(plan)
    chosen = make_plan(small_plan_config(), 2, CPU, measured(block=3.0))
    assert "parallel.layout=[2,2]" in describe(chosen)


def test_links_follow_the_ranks() -> None:
    """Ranks count tensor, then data, then pipeline: TP x DP apart, 8 devices a node."""
    config = small_plan_config(pipeline=4)
    device = device_named("h200", inter_node_gb=1.0, inter_node_latency_us=1000.0)
    bytes_ = message_bytes(config)
    assert bytes_ == 2 * 32 * 64 * 4
    within = bytes_ / 450e9 + 8e-6
    between = bytes_ / 1e9 + 1e-3
    assert link_seconds(config, device, 1) == pytest.approx((within,) * 4)
    # Two replicas: stages 0-3 are ranks 0-1, 2-3, 4-5, 6-7 of one node.
    assert link_seconds(config, device, 2) == pytest.approx((within,) * 4)
    # Four: two stages a node; the last one's next is the first one again.
    assert link_seconds(config, device, 4) == pytest.approx((within, between, within, between))
    assert link_seconds(config, device, 8) == pytest.approx((between,) * 4)


def test_sequence_parallelism_sends_its_share() -> None:
    whole = message_bytes(small_plan_config(tensor=2))
    assert message_bytes(small_plan_config(tensor=2, sequence=True)) == whole / 2


def test_gradients_of_one_replica_go_nowhere() -> None:
    config = deep()
    assert gradient_seconds(config, H200, 1, 10**9, sharded=True) == 0.0
    inside, outside = (
        gradient_seconds(config, H200, size, 10**9, sharded=True) for size in (2, 16)
    )
    # (d - 1) / d of 4 bytes out and 2 back, over NVLink.
    assert inside == pytest.approx(1e9 * 6 / 2 / 450e9, rel=0.01)
    assert outside == pytest.approx(1e9 * 6 * 15 / 16 / 400e9, rel=0.05)


def test_overlapped_gradients_take_what_the_passes_do_not_cover() -> None:
    """A bucket of 40 M parameters of 1 G is ready last and needed first."""
    config = deep("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    out, back = 4e9 * 15 / 16 / 400e9, 2e9 * 15 / 16 / 400e9
    hops = gradient_seconds(deep(), H200, 16, 10**9, sharded=True) - out - back

    def found(backward: float, forward: float) -> float:
        both = {"sharded": True, "backward": backward, "forward": forward}
        return gradient_seconds(config, H200, 16, 10**9, **both) - hops

    assert found(0.0, 0.0) == pytest.approx(out + back)
    assert found(out / 2, back / 4) == pytest.approx(out / 2 + 3 * back / 4)
    assert found(1.0, 1.0) == pytest.approx(0.04 * (out + back))


def test_memory_over_time_peaks_at_what_the_table_says() -> None:
    """Two ways to the same number: closed counts of micro-batches, and the simulated step."""
    for overrides in (
        ["parallel.pipeline=8", "parallel.virtual_pipeline=1"],
        ["parallel.pipeline=4", "parallel.virtual_pipeline=4"],
    ):
        plan = make_plan(deep("training.global_batch_size=32", *overrides), 8, H200)
        for stage, trace, spans in zip(
            plan.partition.stages, plan.memory_traces(), plan.timeline.stages, strict=True
        ):
            found = peak(trace, Timeline((spans,)))
            if stage.head and len(stage.chunks) > 1:
                # The table adds the head's own peak to that of the other chunks: an upper bound.
                assert found <= stage.memory.total < 1.05 * found
            else:
                assert found == pytest.approx(stage.memory.total, rel=1e-9)


def peak(trace: MemoryTrace, timeline: Timeline) -> float:
    held, most = trace.constant, 0.0
    for (forward, chunk, _micro_batch), _start, _end in timeline.stages[0]:
        held += trace.chunks[chunk] if forward else -trace.chunks[chunk]
        most = max(most, held)
    return most


H100_80 = device_named("h100")


def unfit(*overrides: str, gpus: int = 64) -> Plan:
    plan = make_plan(deep(*overrides), gpus, H100_80)
    assert not plan.fits
    return plan


def test_the_smallest_change_is_recomputation() -> None:
    change = smallest_change(unfit("parallel.recompute=none"), more_gpus=False)
    assert change is not None
    overrides, other = change
    assert overrides == ["parallel.recompute=auto"]
    assert other.fits
    assert other.gpus == 64


def test_fewer_logits_at_once_come_before_recomputation() -> None:
    """keel_64 on one stage, given 0.5 GB less than it takes."""
    recipe = ROOT / "yaml" / "paper" / "keel_64.yaml"
    keep = "parallel.recompute=none"
    whole = make_plan(load_config(recipe, [keep]), 8, H200)
    needed = whole.partition.stages[0].memory.total / 1e9
    short = load_config(recipe, [keep, f"parallel.memory_gb={needed - 0.5}"])
    plan = make_plan(short, 8, H200)
    assert not plan.fits
    change = smallest_change(plan, more_gpus=False)
    assert change is not None
    overrides, other = change
    assert overrides == ["kernels.logits_mib=512.0"]
    assert "blocks (in 4 pieces, with recomputed logits)" in describe(other)
    assert "pieces" not in describe(plan)


def test_a_smaller_micro_batch_comes_before_more_stages() -> None:
    plan = unfit("training.micro_batch_size=16", "parallel.virtual_pipeline=1")
    change = smallest_change(plan, more_gpus=False)
    assert change is not None
    assert change[0][0].startswith("training.micro_batch_size=")


def test_one_device_asks_for_more_stages_if_it_may() -> None:
    plan = unfit("parallel.pipeline=1", "parallel.virtual_pipeline=1", gpus=1)
    assert smallest_change(plan, more_gpus=False) is None
    change = smallest_change(plan, more_gpus=True)
    assert change is not None
    assert change[0] == ["parallel.pipeline=2"]
    assert change[1].gpus == 2


@pytest.mark.parametrize("device", ["h200", "h100", "a100", "b200"])
def test_what_is_written_is_what_was_planned(device: str) -> None:
    plan = make_plan(deep(), 64, device_named(device))
    words = describe(plan)
    assert f"64 x {device} on 8 nodes" in words
    assert f"bubble of {plan.bubble:.1%}" in words
    found = plan.as_object()
    assert found["step_seconds"] == plan.step_seconds
    assert math.isclose(sum(s["parameters"] for s in found["stages"]), plan.parameters)


def test_many_stages_share_lines() -> None:
    """64 stages, one in flight fewer on each: the first of equal ones, with the most memory."""
    config = deep(
        "parallel.pipeline=64", "parallel.virtual_pipeline=1", "training.global_batch_size=64"
    )
    plan = make_plan(config, 64, H200)
    lines = describe(plan).splitlines()
    assert len(lines) < 25
    stages = plan.partition.stages
    assert lines[4].split()[:2] == ["0", str(stages[0].blocks)]
    assert f"{stages[0].memory.total / 1e9:.3g}" in lines[4]
    assert lines[-10].split()[0] == "63"


def test_a_plan_says_how_far_it_is_to_be_trusted() -> None:
    """A range around the step, wider where the host is slow; and that no GPU measured it."""
    plan = make_plan(deep(), 64, H200)
    low, high = plan.step_range
    assert 0.8 * plan.step_seconds < low < plan.step_seconds < 1.12 * plan.step_seconds < high
    words = describe(plan)
    assert f"Between {seconds(low)} and {seconds(high)}: predicted, not measured on a GPU." in words
    found = plan.as_object()
    assert found["step_seconds_range"] == [low, high]
    assert found["basis"] == "predicted, not measured on a GPU"
    narrow = make_plan(deep(), 64, device_named("h200", python_scale=0.1))
    assert narrow.spread.high < plan.spread.high
    here = make_plan(small_plan_config(), 2, CPU, measured(block=3.0))
    assert "measured on this machine" in describe(here)
    # The simulator lay at most 12 % below the trainer.
    assert here.step_range == pytest.approx((here.step_seconds, here.step_seconds / 0.88))


def test_a_plan_says_whether_device_or_host_bounds_the_step() -> None:
    one = ("parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.recompute=none")
    slow = device_named("h200", python_scale=3.0)
    bound = {}
    for device in (H200, slow):
        plan = make_plan(deep(*one, "model.blocks=64"), 1, device)
        (stage,), found = plan.partition.stages, plan.as_object()
        bound[found["bound_by"]] = plan
        row = found["stages"][0]
        assert (row["device_seconds"], row["host_seconds"]) == (
            stage.times.device.total,
            stage.times.host.total,
        )
        longer = max(row["device_seconds"], row["host_seconds"])
        assert row["forward_seconds"] + row["backward_seconds"] == pytest.approx(longer)
        passes = plan.step_seconds - plan.closing_seconds
        assert passes == pytest.approx(plan.micro_batches * longer)
        assert f"the {found['bound_by']} bounds the step" in describe(plan)
        assert ("On a host 3.5 times as slow" in describe(plan)) == (device is H200)
    assert bound["host"].device is slow
    assert " x 3)" in describe(bound["host"])
    assert bound["device"].step_seconds < bound["host"].step_seconds
    # Larger micro-batches need fewer launches; a CUDA graph none per block.
    for setting in ("training.micro_batch_size=4", "kernels.cuda_graphs=true"):
        again = make_plan(deep(*one, "model.blocks=64", setting), 1, slow)
        assert again.step_seconds < bound["host"].step_seconds
        assert again.as_object()["bound_by"] == "device"
    assert "bounds the step" not in describe(make_plan(small_plan_config(), 2, CPU))


def test_a_rate_is_stated_of_the_peak_and_of_the_measured_products() -> None:
    plan = make_plan(deep(), 8, H200)
    found = plan.as_object()
    assert found["share_of_measured_products"] == pytest.approx(found["mfu"] * 989.0 / 794.5)
    assert f"{plan.product_share:.1%} of the 794.5 that the largest products reach" in describe(
        plan
    )


def test_a_plan_follows_the_kernels_settings() -> None:
    one = ("parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.recompute=none")
    plain = make_plan(deep(*one), 1, H200).step_seconds
    assert make_plan(deep(*one, "kernels.cuda_graphs=true"), 1, H200).step_seconds < plain
    # Compiled, the sums of norm weights are a pass of their own: no gain over Triton's kernels.
    steps = [
        make_plan(deep(*one, "kernels.triton=[norm]", f"kernels.compile={way}"), 1, H200)
        for way in ("true", "false")
    ]
    assert steps[0].step_seconds < steps[1].step_seconds
    assert plain < steps[1].step_seconds


def test_numbers_are_read_at_a_glance() -> None:
    assert [si(n) for n in (999, 1500, 6.71e9, 1.9e11)] == ["999", "1.5 k", "6.71 B", "190 B"]
    assert [si(n) for n in (1.86e15, 999_900, 9.996e11)] == ["1,860 T", "1 M", "1 T"]
    assert [seconds(t) for t in (2.5, 0.0125, 3e-6)] == ["2.5 s", "12.5 ms", "3 us"]
    assert [duration(t) for t in (864000, 7200, 90)] == ["10.0 days", "2.0 hours", "1.5 minutes"]


def test_devices_keep_a_users_figures() -> None:
    slow: Device = device_named("h200", inter_node_gb=1.0)
    config = deep("parallel.virtual_pipeline=1")
    assert make_plan(config, 64, slow).step_seconds > make_plan(config, 64, H200).step_seconds
