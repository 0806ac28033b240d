"""What autograd keeps between forward and backward pass, against the predicted bytes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from keel_megatron.architecture.residual import RULES
from keel_megatron.layout.costs import _attention_kept, model_costs
from keel_megatron.layout.work import Cost, Shape
from tests.distributed import run_ranks
from tests.settings import settings, small_config

SHAPE: dict[str, Any] = {
    "model__residual": "pre_ln",
    "model__hidden_size": 64,
    "model__ffn_hidden_size": 160,
    "data__seq_length": 64,
}
# Sub-sets of what changes the count; the last is done with the fused kernel, in its interpreter.
CASES: list[dict[str, Any]] = [
    {"training__precision": precision, "training__micro_batch_size": size, **more}
    for precision in ("fp32", "bf16")
    for size, more in (
        (1, {"model__num_query_groups": 2}),
        (2, {"model__residual": "keel"}),
        (2, {"parallel__recompute": "full"}),
        (2, {"parallel__recompute": "light"}),
        (2, {"parallel__recompute": "light", "model__residual": "keel", "kernel": "triton"}),
        (1, {"model__residual": "keel", "model__final_norm": False}),
        (2, {"kernels__logits_mib": 0.05}),  # of 128 tokens' logits 25 at once
        (2, {"model__residual": "keel", "kernel": "triton"}),
        (2, {"data__document_masks": True}),  # the mask is no block's own
    )
]
# Every rule; of 5 to 7 blocks as many are post-norm under Mix-LN.
RULE_CASES: list[dict[str, Any]] = [
    {"training__precision": precision, "model__residual": rule, "model__num_query_groups": 2, **way}
    for rule in RULES
    for precision, way in (("fp32", {}), ("bf16", {}), ("bf16", {"kernel": "triton"}))
]
RULE_CASES += [
    {
        "training__precision": "bf16",
        "model__qk_norm": True,
        "model__num_query_groups": 2,
        **way,
    }
    for way in ({}, {"kernel": "triton"})
]
RULE_CASES += [{**case, "parallel__recompute": "light"} for case in RULE_CASES]
TENSOR_CASES: list[dict[str, Any]] = [
    {"training__precision": precision, "parallel__sequence": sequence, "parallel__tensor": 2}
    for precision in ("fp32", "bf16")
    for sequence in (False, True)
]
TENSOR_CASES += [{**case, "parallel__recompute": "light"} for case in TENSOR_CASES]
# Of 128 tokens' logits all at once, or 25.
HEAD_CASES: list[dict[str, Any]] = [
    {
        "training__precision": precision,
        "training__engine": engine,
        "kernels__logits_mib": mib,
        "parallel__tensor": tensor,
    }
    for tensor in (1, 2)
    for precision in ("fp32", "bf16")
    for engine in ("megatron", "deepspeed")
    for mib in (512.0, 0.05 / tensor)
]
HEAD_CASES += [
    {**case, "training__z_loss": 1e-4}
    for case in HEAD_CASES
    if case["training__engine"] == "megatron"
]
# A GPU's products join the fp32 sums without a tensor of their own, which a CPU's do not.
HEAD_CASES += [
    {**case, "kernel": "triton"}
    for case in HEAD_CASES
    if (case["training__precision"], case["training__engine"]) != ("bf16", "megatron")
]


def kept_bytes(sections: dict[str, Any], runtime: Any) -> int:
    """Bytes of the storages that a forward pass saves, without parameters, table and input."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.base import forward
    from keel_megatron.model.language_model import build_model
    from tests.training.ranks import made_up_batches

    config = RunConfig.model_validate(sections)
    (chunk,) = build_model(config, runtime)
    chunk.train()
    batch = made_up_batches(config, runtime, 0)[0]
    inputs = (batch.tokens, batch.position_ids, batch.labels, chunk.rotary_pos_emb.table)
    known = {tensor.untyped_storage()._cdata for tensor in (*chunk.parameters(), *inputs)}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = forward(chunk, batch)
    assert losses.requires_grad
    # Now, and not when they were saved: some were freed since.
    kept = {storage._cdata: storage.nbytes() for storage in held}
    return sum(size for storage, size in kept.items() if storage not in known)


def measure(cases: list[dict[str, Any]], first: int = 2) -> list[list[int]]:
    """For every case the bytes that models of `first` blocks, one more and two more keep."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.kernels import scaled_add_norm
    from keel_megatron.model import attention, layer
    from keel_megatron.model.rotary import split_rotary
    from keel_megatron.runtime.distributed import start

    found = []
    for case in cases:
        overrides = {**SHAPE, **case}
        backend = overrides.pop("kernel", "auto")
        layer.scaled_add_norm = functools.partial(scaled_add_norm, backend=backend)
        attention.split_rotary = functools.partial(split_rotary, backend=backend)
        config = RunConfig.model_validate(settings(**overrides))
        with start(config.parallel, config.training) as runtime:
            found.append(
                [
                    kept_bytes(settings(**overrides, model__blocks=blocks), runtime)
                    for blocks in range(first, first + 3)
                ]
            )
    return found


@pytest.fixture(scope="module")
def measured() -> list[tuple[dict[str, Any], list[int]]]:
    found = run_ranks(1, measure, CASES)[0]
    found += run_ranks(2, measure, TENSOR_CASES)[0]
    return list(zip(CASES + TENSOR_CASES, found, strict=True))


def test_a_block_keeps_what_is_predicted(measured: Any) -> None:
    """To the byte: in the middle of a chunk every block keeps the same."""
    for case, (two, three, four) in measured:
        overrides = {**SHAPE, **case}
        kernel = overrides.pop("kernel", "torch")
        expected = block_bytes(overrides, kernel)
        assert (three - two, four - three) == (expected, expected), case


def block_bytes(overrides: dict[str, Any], kernel: Any) -> int:
    """What the plan says a block keeps, without what attention keeps on CUDA alone."""
    config = small_config(**overrides)
    cost = model_costs(config, kernel).block
    more = _attention_kept(Shape.of(config)) if kernel == "triton" else 0
    return {
        "none": cost.activation_bytes - more,
        "light": cost.light_bytes - more,
        "full": cost.recompute_bytes,
    }[overrides.get("parallel__recompute", "none")]


def test_a_block_of_every_rule_keeps_what_is_predicted() -> None:
    for case, found in zip(RULE_CASES, run_ranks(1, measure, RULE_CASES, 5)[0], strict=True):
        overrides = {**SHAPE, **case, "model__blocks": 7}
        kernel = overrides.pop("kernel", "torch")
        expected = block_bytes(overrides, kernel)
        assert (found[1] - found[0], found[2] - found[1]) == (expected, expected), case


def test_embedding_and_head_keep_what_is_predicted(measured: Any) -> None:
    """To a hundredth, of models without an exception in their first block and without recompute."""
    compared = 0
    for case, (two, _three, _four) in measured:
        overrides = {**SHAPE, **case}
        if overrides["model__residual"] != "pre_ln" or "parallel__recompute" in overrides:
            continue
        costs = model_costs(small_config(**overrides), "torch")
        rest = two - 2 * costs.block.activation_bytes - costs.block.shared_bytes
        expected = sum(map(held, (costs.embedding, costs.head)))
        assert rest == pytest.approx(expected, rel=1e-2), case
        compared += 1
    assert compared >= 8


def held(cost: Cost) -> int:
    return cost.activation_bytes + cost.logits_bytes


def head_bytes(cases: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """For every case what the output layer and the loss keep, and the most that they hold."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.kernels import triton_cross_entropy
    from keel_megatron.kernels.cross_entropy import linear_cross_entropy
    from keel_megatron.model import head
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start
    from tests.kernels.cases import Unlaunched
    from tests.memory import Watch
    from tests.training.ranks import made_up_batches

    # Without the kernels: the interpreter holds their arguments for a while.
    triton_cross_entropy._row_sums = triton_cross_entropy._gradient = Unlaunched()
    found = []
    for case in cases:
        overrides = dict(case)
        backend = overrides.pop("kernel", "torch")
        head.linear_cross_entropy = functools.partial(linear_cross_entropy, backend=backend)
        config = RunConfig.model_validate(settings(**SHAPE, **overrides, model__blocks=2))
        with start(config.parallel, config.training) as runtime:
            (chunk,) = build_model(config, runtime)
            batch = made_up_batches(config, runtime, 0)[0]
            layer = chunk.output_layer
            if config.training.engine == "megatron":
                layer.weight.main_grad = torch.zeros(layer.weight.shape)
            shape = (*batch.labels.t().shape, config.model.hidden_size)
            x = torch.randn(shape, dtype=layer.weight.dtype, requires_grad=True)
            with Watch() as watch:
                losses, _ = layer(x, labels=batch.labels)
                kept = watch.live - losses.nbytes
                losses.sum().backward()
            found.append((kept, watch.peak))
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_head_holds_what_is_predicted(tensor: int) -> None:
    """What it keeps to the byte; its peak to what some numbers a row take.

    Of what was reduced over ranks, 4 and 8 bytes a row, gloo's thread may let go a moment later.
    """
    cases = [case for case in HEAD_CASES if case["parallel__tensor"] == tensor]
    for case, (kept, peak) in zip(cases, run_ranks(tensor, head_bytes, cases)[0], strict=True):
        overrides = dict(case)
        kernel = overrides.pop("kernel", "torch")
        config = small_config(**SHAPE, **overrides)
        cost = model_costs(config, kernel).head
        tokens = config.data.seq_length * config.training.micro_batch_size
        reduced = (4 + 8) * tokens if tensor > 1 else 0
        assert 0 <= kept - cost.logits_bytes <= reduced, case
        over = peak - (cost.logits_bytes + cost.working_bytes)
        assert -16 * tokens <= over < 48 * tokens, case
