"""What `data.document_masks` adds to a block's cost.

bf16 on CUDA runs FlashAttention over the documents one after another: with several sequences in a
micro-batch query, key, value and result are copied, and the copied result is kept. Everything else
runs with a bias of the scores in memory, which a micro-batch's blocks share: its kernels compute
the pairs that are masked too. How long documents are is not known, so the saving of short ones is
not counted.
"""

from __future__ import annotations

from dataclasses import replace

from keel_megatron.architecture.flops import attention_score_flops
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.work import Cost, Kernel, Shape, Work


def with_documents(cost: Cost, config: RunConfig, kernel: Kernel) -> Cost:
    """The cost of a run's block, with its document masks.

    Args:
        cost: of the block without.
        config: the run.
        kernel: of the device.
    """
    if not config.data.document_masks:
        return cost
    shape = Shape.of(config)
    sequences = config.training.micro_batch_size
    if kernel == "torch" or config.training.precision == "fp32":
        # Twice the products of the causal half: 2 of them forward, 5 backward.
        scores = attention_score_flops(config.model, shape.seq_length) * shape.tokens / shape.tp
        return replace(
            cost,
            forward=_more_scores(cost.forward, scores),
            backward=_more_scores(cost.backward, 2.5 * scores),
            shared_bytes=sequences * shape.seq_length**2 * shape.c,
        )
    if sequences == 1:
        return cost
    copy, kept = 2 * shape.c * shape.tokens, shape.c * shape.tokens * shape.attention
    return replace(
        cost,
        # Query, key, value and the result; then the result's gradient.
        forward=_copied(cost.forward, copy * 2 * (shape.attention + shape.groups), 4),
        backward=_copied(cost.backward, copy * shape.attention, 1),
        activation_bytes=cost.activation_bytes + kept,
        light_bytes=cost.light_bytes + kept,
    )


def _more_scores(work: Work, flops: float) -> Work:
    return replace(work, flops=work.flops + flops, attention_flops=work.attention_flops + flops)


def _copied(work: Work, size: int, kernels: int) -> Work:
    return replace(work, other_bytes=work.other_bytes + size, kernels=work.kernels + kernels)
