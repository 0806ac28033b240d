"""What document masks add to a block, in time and memory; a strict trace checks the bytes."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.memory import MemoryModel
from keel_megatron.layout.work import Cost, Kernel
from tests.settings import small_config

BF16: dict[str, Any] = {"training__precision": "bf16"}
S, B, HIDDEN, GROUPS = 32, 2, 64, 32


def pair(kernel: Kernel, **overrides: Any) -> tuple[Cost, Cost]:
    """A block without and with masks."""
    settings = {"model__num_query_groups": 2, **overrides}
    without, with_masks = (
        model_costs(small_config(**settings, data__document_masks=on), kernel).block
        for on in (False, True)
    )
    return without, with_masks


def test_documents_of_several_sequences_are_copied_on_cuda() -> None:
    without, found = pair("triton", **BF16)
    assert found.forward.kernels - without.forward.kernels == 4
    assert found.backward.kernels - without.backward.kernels == 1
    # Query and result of the hidden size, key and value of the groups'; read and written.
    moved = found.forward.other_bytes - without.forward.other_bytes
    assert moved == 2 * 2 * S * B * (2 * HIDDEN + 2 * GROUPS)
    assert found.activation_bytes - without.activation_bytes == 2 * S * B * HIDDEN
    assert found.forward.flops == without.forward.flops
    assert found.shared_bytes == 0


def test_one_sequence_costs_nothing_on_cuda() -> None:
    without, found = pair("triton", **BF16, training__micro_batch_size=1)
    assert found == without


@pytest.mark.parametrize(("kernel", "precision"), [("torch", "bf16"), ("triton", "fp32")])
def test_a_mask_is_shared_and_computes_all_pairs(kernel: Kernel, precision: str) -> None:
    without, found = pair(kernel, training__precision=precision)
    assert found.shared_bytes == B * S * S * (4 if precision == "fp32" else 2)
    assert found.forward.attention_flops == 2 * without.forward.attention_flops
    assert found.activation_bytes == without.activation_bytes


def test_a_chunk_has_one_mask_a_micro_batch_in_flight() -> None:
    config = small_config(data__document_masks=True, parallel__pipeline=2)
    costs = model_costs(config, "torch")
    memory = MemoryModel(config, costs, 1)
    inputs = [memory.stage(stage, [4], [0]).inputs for stage in (0, 1)]
    without = small_config(parallel__pipeline=2)
    plain = MemoryModel(without, model_costs(without, "torch"), 1)
    for stage, (blocks, masks) in enumerate([(4, 2), (4, 1)]):
        found = memory.stage(stage, [blocks], [0]).activations
        expected = plain.stage(stage, [blocks], [0]).activations + masks * costs.block.shared_bytes
        assert found == expected
    assert memory.stage(1, [0], [0]).activations == plain.stage(1, [0], [0]).activations
    # The numbers of documents on both stages, and the mask of the labels.
    before = [plain.stage(stage, [4], [0]).inputs for stage in (0, 1)]
    assert [a - b for a, b in zip(inputs, before, strict=True)] == [4 * 16 * S, 8 * 16 * S]
