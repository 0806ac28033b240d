"""Costs by hand and by counting; times by a roofline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.layout import kernel_counts
from keel_megatron.layout.block_costs import typical_rows
from keel_megatron.layout.costs import SEED_BYTES, model_costs
from keel_megatron.layout.devices import DEVICES, device_named
from keel_megatron.layout.times import Times, UnitTimes, predicted_times
from keel_megatron.layout.work import Cost, Costs
from tests.settings import small_config

TOKENS = 2 * 32
PAPER: dict[str, Any] = {
    "model__hidden_size": 1024,
    "model__ffn_hidden_size": 3072,
    "model__num_attention_heads": 16,
    "model__num_query_groups": 8,
    "data__seq_length": 4096,
    "data__vocab_size": 131072,
    "training__precision": "bf16",
    "training__micro_batch_size": 1,
}


def costs_of(**overrides: Any) -> Costs:
    return model_costs(small_config(**overrides))


def weights(costs: Costs, blocks: int) -> int:
    def each(cost: Cost) -> int:
        return cost.parameters + cost.vector_parameters

    return each(costs.embedding) + blocks * each(costs.block) + each(costs.head)


def test_forward_flops_are_the_models() -> None:
    costs, config = costs_of(), small_config()
    forward = 8 * costs.block.forward.flops + costs.head.forward.flops
    assert 3 * forward == pytest.approx(training_flops_per_token(config.model, 32, 512) * TOKENS)
    # Going back, flash attention does 5 products for the forward pass's 2: half a forward more.
    scores = 2 * 2 * 64 * (32 + 1) / 2 * TOKENS
    assert costs.block.backward.flops == 2 * costs.block.forward.flops + scores / 2


def test_tensor_parallelism_divides_matrices_and_not_norm_weights() -> None:
    one, two = costs_of(), costs_of(parallel__tensor=2)
    assert weights(one, 8) == parameter_count(small_config().model, 512) + 64  # the first block's
    for a, b in ((one.embedding, two.embedding), (one.block, two.block), (one.head, two.head)):
        assert (a.parameters, a.vector_parameters) == (2 * b.parameters, b.vector_parameters)
        assert a.forward.flops == 2 * b.forward.flops
        assert a.forward.communication_bytes == 0.0 < b.forward.communication_bytes


def test_tied_embeddings_are_one_matrix_on_one_stage_and_a_copy_on_the_last() -> None:
    assert costs_of(model__tie_embeddings=True).head.parameters == 0
    assert costs_of(model__tie_embeddings=True, parallel__pipeline=2).head.parameters == 512 * 64


def test_messages_of_a_tensor_group() -> None:
    """Two all-reduces of [s, b, h] each way, each twice (TP - 1) / TP of it; SP collects again."""
    whole = TOKENS * 64 * 4
    plain = costs_of(parallel__tensor=4).block
    assert plain.forward.communication_bytes == 2 * 2 * whole * 3 / 4
    assert plain.backward.communication_bytes == 2 * 2 * whole * 3 / 4
    sequence = costs_of(parallel__tensor=4, parallel__sequence=True).block
    assert sequence.forward.communication_bytes == plain.forward.communication_bytes
    assert sequence.backward.communication_bytes == 1.5 * plain.backward.communication_bytes


def test_sequence_parallelism_and_recompute_keep_less() -> None:
    plain = costs_of(parallel__tensor=2).block
    split = costs_of(parallel__tensor=2, parallel__sequence=True).block
    assert split.activation_bytes < plain.activation_bytes
    assert split.recompute_bytes == plain.recompute_bytes / 2
    assert plain.recompute_bytes == TOKENS * 64 * (4 + 4)  # the stream and the branch's input


def test_a_block_of_the_paper_takes_what_the_field_knows() -> None:
    """0.14 TFLOP forward: 0.2 ms of products at H200 rates, and norms and the rest besides.

    A head of 128k costs about five blocks, seven with its softmax in torch's operators; and a
    product of four more where its logits are made again.
    """
    times = predicted_times(costs_of(**PAPER), DEVICES["h200"])
    assert 0.2e-3 < times.block.forward < 0.4e-3
    assert 4.5 < times.head.total / times.block.total < 6
    plain = predicted_times(costs_of(**PAPER, kernels__triton=["norm"]), DEVICES["h200"])
    assert 7 < plain.head.total / plain.block.total < 8
    pieces = predicted_times(costs_of(**PAPER, kernels__logits_mib=512.0), DEVICES["h200"])
    assert 6 < pieces.head.total / pieces.block.total < 7


def test_a_head_in_pieces_multiplies_once_more_and_keeps_no_logits() -> None:
    """Of 4096 tokens of a vocabulary of 2^17 four times 1024, of 512 MiB each in fp32."""
    plain = {**PAPER, "kernels__triton": ["norm", "rotary", "swiglu"]}
    pieces, whole = costs_of(**plain, kernels__logits_mib=512.0).head, costs_of(**plain).head
    assert pieces.forward.flops == whole.forward.flops
    assert pieces.backward.flops == 3 * pieces.forward.flops == 1.5 * whole.backward.flops
    logits = 4 * 4096 * 2**17
    assert whole.logits_bytes == logits + 8 * 4096
    assert pieces.logits_bytes == 8 * 4096
    # Logits and their softmax, of a quarter; the gradient of the layer's input; losses and theirs.
    assert pieces.working_bytes == 2 * logits / 4 + 4096 * (1024 * 2 + 16)
    assert whole.working_bytes == logits + 4096 * 16


def test_a_gradient_in_the_logits_place_moves_six_bytes_a_logit_and_keeps_two() -> None:
    """Read in the forward pass; read and replaced going back. Of all rows one set of logits is."""
    logits = 4096 * 2**17
    pieces, whole = costs_of(**PAPER, kernels__logits_mib=512.0).head, costs_of(**PAPER).head
    norm = 4096 * 1024 * (4 + 2)
    for head in (pieces, whole):
        assert head.forward.other_bytes - norm == 2 * logits
        assert head.backward.other_bytes - 2 * norm == 4 * logits
    assert whole.logits_bytes == 2 * logits + (8 + 4) * 4096
    assert pieces.logits_bytes == (8 + 4) * 4096
    # The gradient of the layer's input; losses and theirs.
    assert whole.working_bytes == 4096 * (1024 * 2 + 16)
    assert pieces.working_bytes == 2 * logits / 4 + 4096 * (1024 * 2 + 16)
    # In torch's operators the product writes fp32 logits: 2 more, softmax 8; going back 16 and 6.
    plain = costs_of(**PAPER, kernels__triton=["norm", "rotary", "swiglu"]).head
    assert plain.forward.other_bytes - norm == (2 + 8) * logits
    assert plain.backward.other_bytes - 2 * norm == (16 + 6) * logits


def test_swiglu_in_torchs_operators_is_six_kernels_with_twice_the_access() -> None:
    """Also where light recomputation makes its output again."""
    fused = costs_of(**PAPER).block
    plain = costs_of(**PAPER, kernels__triton=["norm", "rotary", "cross_entropy"]).block
    one = 4096 * 3072 * 2
    for name, moved, kernels in (("forward", 2, 1), ("backward", 6, 3), ("light", 2, 1)):
        torchs, tritons = getattr(plain, name), getattr(fused, name)
        assert torchs.other_bytes - tritons.other_bytes == moved * one, name
        assert torchs.kernels - tritons.kernels == kernels, name
    # The compiled block has a kernel of its own.
    compiled = {**PAPER, "kernels__compile": True}
    assert (
        costs_of(**compiled, kernels__triton=["norm"]).block.forward
        == costs_of(**compiled, kernels__triton=["norm", "swiglu"]).block.forward
    )


def test_one_rotary_kernel_reads_and_writes_each_element_once() -> None:
    """A part of 33 MB each way, where seven kernels each way move 71 MB at strides."""
    fused = costs_of(**PAPER)
    plain = costs_of(**PAPER, kernels__triton=["norm", "swiglu", "cross_entropy"])
    moved = 4096 * (1024 + 2 * 512) * 2 * 2
    for one, other in (
        (fused.block.forward, plain.block.forward),
        (fused.block.backward, plain.block.backward),
    ):
        assert one.strided_bytes == 0 < moved < other.strided_bytes
        assert one.other_bytes - other.other_bytes == moved
        assert one.kernels == other.kernels - 6
    # Norms of heads come before the split, and leave the kernel as it is.
    assert costs_of(**PAPER, model__qk_norm=True).block.forward.strided_bytes == 0


def test_norms_of_heads_cost_what_they_normalise() -> None:
    """Keys are half of the queries in number, and so are values, which QK-norm copies."""
    operators = {**PAPER, "kernels__triton": ["norm", "swiglu", "cross_entropy"]}
    plain, qk = costs_of(**operators).block, costs_of(**operators, model__qk_norm=True).block
    assert qk.vector_parameters == plain.vector_parameters + 2 * 64
    assert qk.parameters == plain.parameters
    kept = 4096 * (2 * (1024 + 2 * 512) + 4 * (16 + 8))
    assert qk.activation_bytes == plain.activation_bytes + kept
    moved = 4096 * ((2 * 2 + 7 * 4) * (1024 + 512) + 2 * 2 * 512)
    assert qk.forward.other_bytes == plain.forward.other_bytes + moved
    assert qk.forward.flops == plain.forward.flops
    sums = 2  # of the weights' gradients, into DDP's
    assert qk.forward.kernels == plain.forward.kernels + 11
    assert qk.backward.kernels == plain.backward.kernels + 14 + sums
    fused, without = costs_of(**PAPER, model__qk_norm=True).block, costs_of(**PAPER).block
    assert fused.activation_bytes == without.activation_bytes + 4096 * 2 * (1024 + 2 * 512)
    assert fused.forward == without.forward
    assert fused.backward.kernels == without.backward.kernels + 2 + sums
    assert fused.backward.other_bytes > without.backward.other_bytes


@pytest.mark.parametrize(("groups", "repeated"), [(8, 1024 - 512), (16, 0)])
def test_in_fp32_cuda_keeps_key_and_value_of_every_head(groups: int, repeated: int) -> None:
    config = small_config(
        **PAPER
        | {"training__precision": "fp32", "model__num_query_groups": groups, "kernels__triton": []}
    )
    on_cuda, on_cpu = (model_costs(config, kernel).block for kernel in ("triton", "torch"))
    more = on_cuda.activation_bytes - on_cpu.activation_bytes
    assert more == SEED_BYTES + 2 * 4096 * 4 * repeated


def test_what_is_not_selected_is_as_on_a_cpu() -> None:
    """But for the seeds that attention keeps on CUDA."""
    block, on_cpu = (
        costs_of(**PAPER, kernels__triton=[]).block,
        model_costs(small_config(**PAPER), "torch").block,
    )
    assert block.activation_bytes == on_cpu.activation_bytes + SEED_BYTES
    kept = {"activation_bytes": on_cpu.activation_bytes, "light_bytes": on_cpu.light_bytes}
    assert replace(block, **kept) == on_cpu


def test_a_roofline_is_bound_by_memory_or_products() -> None:
    costs = costs_of(**PAPER)
    free = {"kernel_gap_us": 0.0, "matmul_setup_us": 0.0, "matmul_setup_k": 0.0}
    base = predicted_times(costs, device_named("h200", **free)).block.forward
    no_products = predicted_times(costs, device_named("h200", tflops=1e9, **free)).block.forward
    no_memory = device_named("h200", memory_bandwidth_gb=1e12, **free)
    forward = costs.block.forward
    products = (forward.flops - forward.attention_flops) / (989e12 * 0.852)
    products += forward.attention_flops / (989e12 * 0.373)
    assert predicted_times(costs, no_memory).block.forward == pytest.approx(products, rel=1e-6)
    assert 0 < no_products < base


def test_an_operator_of_a_cpu_takes_at_least_its_overhead() -> None:
    costs = model_costs(small_config(), "torch")
    count = kernel_counts.total(
        kernel_counts.block(typical_rows(small_config().model), fused=False, rotary=False)
    )
    found = predicted_times(costs, device_named("cpu", kernel_launch_us=1e4)).block
    assert found.forward == pytest.approx(1e-2 * costs.block.forward.kernels)
    assert costs.block.forward.kernels >= count[0]


def test_measured_times_are_plain_numbers() -> None:
    times = UnitTimes(embedding=Times(1.0, 2.0), block=Times(3.0, 4.0), head=Times(5.0, 6.0))
    assert times.block.total == 7.0
