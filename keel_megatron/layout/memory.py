"""Memory of each pipeline stage, by kind, under Megatron-core's schedules.

The number of micro-batches in flight on a stage follows
megatron/core/pipeline_parallel/schedules.py (0.16.1). With p stages, v chunks per stage and m
micro-batches, stage r runs W warm-up forward passes of a chunk:

    v = 1: W = min(p - r - 1, m)              (none without a pipeline)
    v > 1: W = min(2 (p - r - 1) + (v - 1) p, v m)

and then one forward pass before each backward pass. Forward pass number k is of chunk
floor((k mod p v) / p); backward passes run through the chunks in reverse order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from keel_megatron.architecture.residual import streams
from keel_megatron.config.run import RunConfig
from keel_megatron.layout import kernel_counts
from keel_megatron.layout.block_costs import typical_rows
from keel_megatron.layout.muon import MuonLoad, muon_load
from keel_megatron.layout.recomputation import Recomputation, least
from keel_megatron.layout.work import STREAM_BYTES, Cost, Costs
from keel_megatron.layout.zero_memory import Sizes, ZeroMemory, zero_memory

GB = 1e9
_LEAST = 512
"""Bytes of the smallest allocation on a GPU: a tensor of one number takes them."""
_FEW = 32
"""Tensors of one number in a step besides those that are counted: sums, factors, flags."""


@dataclass(frozen=True)
class StageMemory:
    """Peak memory of one device of a stage, in bytes, by kind."""

    parameters: int
    gradients: int
    """fp32 gradients, in Megatron-core's or ZeRO's buffers."""
    optimizer: int
    """AdamW's or Muon's moments, and fp32 master weights in bf16."""
    activations: int
    """Activations of the micro-batches in flight, after recomputation; without the logits."""
    logits: int
    """Logits: what the loss keeps, and temporary memory in the head. 0 if a block's or the
    embedding's backward pass, after which they are free, needs more."""
    inputs: int
    """A step's micro-batches, which are all copied to the device at its start, the rotary table of
    every chunk, and tensors of one number."""
    communication: int
    """Buffers of messages between stages, activations gathered from the tensor group under SP, and
    the gradient buffers of CUDA graphs."""
    working: int
    """Temporary memory in the backward pass of a block, with the recomputed activations, or of the
    embedding; 0 if the head needs more. And what Muon's update needs beyond the activations, which
    are free then."""
    host: int = 0
    """Host memory that ZeRO offloads to, for this device; not part of the total."""

    @property
    def total(self) -> int:
        """Sum of all kinds: at the fullest moment of a step. A save allocates nothing."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.inputs
            + self.communication
            + self.working
        )


@cache
def in_flight(
    pipeline: int, virtual_pipeline: int, stage: int, micro_batches: int
) -> tuple[tuple[int, ...], ...]:
    """Micro-batches in flight per chunk, at the moments of peak memory.

    Args:
        pipeline: number of stages p.
        virtual_pipeline: chunks per stage v.
        stage: stage number r, from 0.
        micro_batches: micro-batches m per replica and optimizer step.

    Returns:
        Tuples of v counts, one per moment; the counts of any other moment do not exceed all of one
        of them. A chunk never holds more micro-batches than an earlier chunk of its stage.
    """
    if virtual_pipeline == 1:
        return ((min(pipeline - stage, micro_batches),),)
    period = pipeline * virtual_pipeline
    last = virtual_pipeline * micro_batches
    ahead = min(2 * (pipeline - stage - 1) + (virtual_pipeline - 1) * pipeline, last)
    if ahead == last:
        return ((micro_batches,) * virtual_pipeline,)

    def started(passes: int, chunk: int) -> int:
        whole, rest = divmod(passes, period)
        return whole * pipeline + min(max(rest - chunk * pipeline, 0), pipeline)

    # Between multiples of p forward and p backward passes, every count is linear in time. So the
    # peak, for any weights, is at such a multiple; after that the pattern repeats.
    first, end = ahead + 1, min(ahead + 1 + 2 * period, last)
    multiples = range(0, end + pipeline, pipeline)
    moments = {first, end} | set(multiples) | {n + first for n in multiples}
    counts = {
        tuple(
            started(n, chunk) - started(n - first, virtual_pipeline - 1 - chunk)
            for chunk in range(virtual_pipeline)
        )
        for n in moments
        if first <= n <= end
    }
    return tuple(sorted(one for one in counts if not _below_another(one, counts)))


def _below_another(one: tuple[int, ...], counts: set[tuple[int, ...]]) -> bool:
    return any(
        one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in counts
    )


@dataclass(frozen=True)
class MemoryModel:
    """Memory of the stages of a run.

    Args:
        config: the run; its parallel, optimizer and precision settings matter.
        costs: costs of embedding, block and head.
        data_parallel: number of replicas.
    """

    config: RunConfig
    costs: Costs
    data_parallel: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches per replica and optimizer step."""
        training = self.config.training
        of_replica = training.global_batch_size // self.data_parallel
        return max(1, of_replica // training.micro_batch_size)

    def stage(
        self,
        stage: int,
        blocks: Sequence[int],
        recomputed: Sequence[int],
        light: Sequence[int] | None = None,
    ) -> StageMemory:
        """Memory of a stage.

        Args:
            stage: stage number, from 0; the first has the embedding, the last the head.
            blocks: blocks per chunk.
            recomputed: fully recomputed blocks per chunk.
            light: lightly recomputed blocks per chunk; None: none.
        """
        parallel, costs = self.config.parallel, self.costs
        pieces = [(costs.block, sum(blocks))]
        head = stage == parallel.pipeline - 1
        pieces += [(costs.embedding, 1)] if stage == 0 else []
        pieces += [(costs.head, 1)] if head else []
        weights = sum(cost.parameters * count for cost, count in pieces)
        norm_weights = sum(cost.vector_parameters * count for cost, count in pieces)
        muon = muon_load(self.config, sum(blocks), self.data_parallel, costs.muon_bytes)
        states = self._states(weights, norm_weights, costs.block.parameters * sum(blocks), muon)
        light = light or (0,) * len(blocks)
        activations, logits, working = self._fullest(stage, blocks, recomputed, light)
        working += max(0, muon.temporary_bytes - activations - logits - working)
        return StageMemory(
            parameters=states.parameters,
            gradients=states.gradients,
            optimizer=states.optimizer,
            activations=activations,
            logits=logits,
            inputs=self._inputs(stage, len(blocks)) + self._numbers(blocks, head=head),
            communication=self._communication() + states.buffers + self._recorded(sum(blocks)),
            host=states.host,
            working=working,
        )

    def recomputation(
        self, stage: int, blocks: Sequence[int], limit: float | None
    ) -> Recomputation | None:
        """The least recomputation of a stage that fits in the limit (recomputation.py).

        Args:
            stage: stage number, from 0.
            blocks: blocks per chunk.
            limit: bytes per device; None: no limit.

        Returns:
            The counts, or None if the stage does not fit.
        """
        return least(
            self.config,
            blocks,
            lambda chosen: limit is None or self.stage(stage, blocks, *chosen).total <= limit,
        )

    def _states(self, weights: int, norm_weights: int, matrices: int, muon: MuonLoad) -> ZeroMemory:
        """Bytes of parameters, gradients and optimizer state.

        Under Megatron-core, norm weights and gradient buffers are fp32 in any precision. Muon's
        matrices are not in its buffers, and have one moment; fp32 weights are their own masters.

        Args:
            weights: without norm weights.
            norm_weights: and learned vectors.
            matrices: of the blocks, part of `weights`.
            muon: Muon's share; nothing under AdamW.
        """
        if self.config.training.engine == "deepspeed":
            model, tensor = self.config.model, self.config.parallel.tensor
            inner = 2 * model.ffn_hidden_size * model.hidden_size // tensor
            largest = max(self.costs.embedding.parameters, inner)
            return zero_memory(
                self.config, Sizes(weights, norm_weights, largest), self.data_parallel
            )
        size, master = (2, 4) if self.config.training.precision == "bf16" else (4, 0)
        if muon.buffer:
            weights -= matrices
        optimizer = master * weights + 8 * (weights + norm_weights)
        if self.config.parallel.distributed_optimizer:
            optimizer = -(-optimizer // self.data_parallel)
        return ZeroMemory(
            size * (weights + muon.buffer) + 4 * norm_weights,
            4 * (weights + norm_weights + muon.buffer),
            optimizer + (master + 4) * muon.own,
            0,
            0,
        )

    def _fullest(
        self, stage: int, blocks: Sequence[int], recomputed: Sequence[int], light: Sequence[int]
    ) -> tuple[int, int, int]:
        """Activations, logits and working memory at the fullest moment of a stage.

        It is in the backward pass of the head, of a block or of the embedding: each frees its
        activations before the next one begins.
        """
        parallel, costs = self.config.parallel, self.costs
        kept = [
            costs.block.kept_bytes(*one) + (costs.block.shared_bytes if one[0] else 0)
            for one in zip(blocks, recomputed, light, strict=True)
        ]
        if stage == 0:
            kept[0] += costs.embedding.activation_bytes
        moments = in_flight(parallel.pipeline, len(blocks), stage, self.micro_batches)
        held = max(
            sum(count * size for count, size in zip(moment, kept, strict=True))
            for moment in moments
        )
        working = self._working(blocks, recomputed, light)
        if stage == 0:  # the first chunk's blocks have freed what they kept of this micro-batch
            working = max(working, costs.embedding.working_bytes - kept[0])
        # The head's backward pass directly follows its forward pass: at most one is in flight.
        logits = costs.head.logits_bytes + costs.head.working_bytes
        if stage == parallel.pipeline - 1 and costs.head.activation_bytes + logits >= working:
            return held + costs.head.activation_bytes, logits, 0
        return held, 0, working

    def _inputs(self, stage: int, chunks: int) -> int:
        """Bytes of a step's micro-batches and of the rotary tables.

        The first stage has tokens, the last one labels and their mask, every stage documents.
        """
        config = self.config
        last = stage == config.parallel.pipeline - 1
        a_token = 8 * (int(stage == 0) + int(last))
        a_token += 4 * config.data.document_masks + 4 * (config.data.has_loss_mask and last)
        tokens = self.micro_batches * config.training.micro_batch_size * config.data.seq_length
        size = 2 if config.training.precision == "bf16" else 4
        table = 2 * size * config.data.seq_length * config.model.head_dim
        return a_token * tokens + chunks * table

    def _numbers(self, blocks: Sequence[int], *, head: bool) -> int:
        """Bytes of tensors of one number: each weight's count of updates, and the losses."""
        # A block's four matrices and its norms; the embedding, the head and its norm. Muon counts
        # no updates, and has factors of rate and decay for each kind of matrix.
        matrices = 0 if self.config.optimizer.name == "muon" else 4
        vectors = kernel_counts.weights(typical_rows(self.config.model))
        weights = sum(blocks) * (matrices + vectors) + 3
        if self.config.parallel.distributed_optimizer:
            weights = -(-weights // self.data_parallel)
        return _LEAST * (weights + (self.micro_batches if head else 0) + _FEW)

    def _communication(self) -> int:
        config, parallel = self.config, self.config.parallel
        tokens = config.data.seq_length * config.training.micro_batch_size
        whole = tokens * config.model.hidden_size
        collected = whole * (2 if config.training.precision == "bf16" else 4)
        stream = STREAM_BYTES * streams(config.model) * whole
        stream //= parallel.tensor if parallel.sequence else 1
        # Receive and send buffers, forward and backward; interleaving has two of each.
        messages = 0 if parallel.pipeline == 1 else 4 * min(parallel.virtual_pipeline, 2)
        return messages * stream + (collected if parallel.sequence else 0)

    def _recorded(self, blocks: int) -> int:
        """Bytes of the blocks' gradients, in their weights' types, that CUDA graphs write into."""
        if not self.config.kernels.cuda_graphs:
            return 0
        block, size = self.costs.block, 2 if self.config.training.precision == "bf16" else 4
        return blocks * (size * block.parameters + 4 * block.vector_parameters)

    def _working(
        self, blocks: Sequence[int], recomputed: Sequence[int], light: Sequence[int]
    ) -> int:
        """Temporary memory of a block's backward pass, with what a recomputed block makes again.

        Recomputed blocks are the first of a chunk: when the backward pass comes to them, the others
        have freed what they kept, and the chunk holds its blocks' inputs.
        """
        block: Cost = self.costs.block
        made = block.activation_bytes - block.recompute_bytes
        again = [
            made + count * block.recompute_bytes - block.kept_bytes(count, full, lightly)
            for count, full, lightly in zip(blocks, recomputed, light, strict=True)
            if full
        ]
        return block.working_bytes + max([0, *again]) if any(blocks) else 0
