"""Tasks that are evaluated while a run trains, by its own engine and in its own micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.engines.base import Engine
from keel_megatron.errors import UserError
from keel_megatron.evaluation.metrics import Question, measure
from keel_megatron.evaluation.packing import Numbers, Packing, Sequences
from keel_megatron.evaluation.requests import SETTING, find, read
from keel_megatron.evaluation.rows import Row
from keel_megatron.model.documents import takes_borders
from keel_megatron.model.language_model import COMPUTE_DTYPES
from keel_megatron.runtime.distributed import Runtime

Results = Mapping[str, Mapping[str, float]]
"""Of each task by name, its metrics by name."""


class _Encoder(Protocol):
    eod: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Prepared:
    """What global rank 0 has read."""

    packing: Packing
    questions: dict[str, list[Question]]
    """Of each task; their rows follow each other in this order."""
    remarks: list[str]


class Evaluation:
    """The tasks of a run, tokenized and packed, and the loop over them.

    Args:
        config: the run.
        runtime: this rank's place.
        prepared: the tasks.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, prepared: Prepared) -> None:
        size, replicas = config.training.micro_batch_size, runtime.data_size
        self._runtime = runtime
        self._questions = prepared.questions
        self._packing = prepared.packing
        self._together = shares_sequences(config, runtime.device)
        # As many micro-batches at a time as a step has: a request to stop is answered after them.
        self._at_once = config.training.global_batch_size // (size * replicas)
        multiple = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
        rounds = -(-len(prepared.packing) // (size * replicas * multiple))
        self._size, self._micro_batches = size, rounds * multiple

    def run(
        self, engine: Engine, stop: Callable[[], bool], mark: Callable[[str], None]
    ) -> Results | None:
        """Evaluate the tasks; collective.

        Args:
            engine: has the model.
            stop: whether this rank is asked to stop; asked between parts of the work.
            mark: called after each part.

        Returns:
            The results on global rank 0, nothing on the others; None if any rank was asked to stop.
        """
        runtime = self._runtime
        sums = torch.zeros(self._packing.rows + 1, dtype=torch.float64, device=runtime.device)
        for start in range(0, self._micro_batches, self._at_once):
            if runtime.any(stop()):
                return None
            end = min(start + self._at_once, self._micro_batches)
            parts = [self._part(number) for number in range(start, end)]
            losses = engine.token_losses([self._batch(part) for part in parts], len(parts))
            if runtime.tensor_rank == 0:  # each of the tensor ranks has the same
                for part, loss in zip(parts, losses, strict=False):  # none before the last stage
                    rows = torch.from_numpy(part.rows).to(runtime.device, torch.int64)
                    sums.index_add_(0, rows.flatten(), loss.flatten().double())
            mark(f"part {start // self._at_once + 1} of an evaluation")
        dist.all_reduce(sums)
        if not runtime.is_main:
            return {}
        return self._measured((-sums[:-1]).tolist())

    def _measured(self, log_probabilities: Sequence[float]) -> Results:
        """The metrics of each task."""
        results, start = {}, 0
        for name, questions in self._questions.items():
            end = start + sum(len(one.characters) for one in questions)
            results[name] = measure(questions, log_probabilities[start:end])
            start = end
        return results

    def _part(self, number: int) -> Sequences:
        """The sequences of a micro-batch of this replica."""
        runtime = self._runtime
        first = (number * runtime.data_size + runtime.data_rank) * self._size
        return self._packing.sequences(first, self._size)

    def _batch(self, part: Sequences) -> Batch:
        """The micro-batch that this stage is given."""
        runtime = self._runtime
        batch = Batch(
            tokens=_numbers(part.tokens, torch.int64),
            labels=_numbers(part.labels, torch.int64),
            documents=_numbers(part.documents, torch.int32) if self._together else None,
        )
        last = runtime.pipeline_rank == runtime.pipeline_size - 1
        return batch.only(tokens=runtime.pipeline_rank == 0, labels=last)


def open_evaluation(
    config: RunConfig, runtime: Runtime, tokenizer: Path, say: Callable[[str], None]
) -> Evaluation | None:
    """The evaluation of a run; None if it has none. Collective.

    Args:
        config: the run.
        runtime: this rank's place.
        tokenizer: the tokenizer's file; read on global rank 0.
        say: called with messages.

    Raises:
        UserError: a task is missing, its file is damaged, or a continuation is longer than the
            context.
    """
    if not config.evaluation.every:
        return None
    together = shares_sequences(config, runtime.device)
    prepared = runtime.from_main(lambda: _prepared(config, tokenizer, together=together))
    for remark in prepared.remarks:
        say(remark)
    return Evaluation(config, runtime, prepared)


def shares_sequences(config: RunConfig, device: torch.device) -> bool:
    """Whether several rows share a sequence, with attention within each.

    Not where training has no kernel for it, nor memory for a mask [b, 1, s, s].
    """
    if config.kernels.backend == "transformer_engine":
        return False
    dtype = COMPUTE_DTYPES[config.training.precision]
    has_kernel = takes_borders(device, dtype, config.model.head_dim)
    return config.data.document_masks or has_kernel or device.type == "cpu"


def _prepared(config: RunConfig, tokenizer: Path, *, together: bool) -> Prepared:
    """Read, tokenize and pack the tasks."""
    encoder, length = open_tokenizer(tokenizer), config.data.seq_length
    rows: list[Row] = []
    questions, remarks, named = {}, [], []
    for task in find(config.evaluation):
        documents = read(task, config.evaluation.limit)
        cut = 0
        for document in documents:
            for context, continuation in document.choices:
                row, is_cut = _row(context, continuation, encoder, length, task.name)
                rows.append(row)
                cut += is_cut
        questions[task.name] = [Question.of(document) for document in documents]
        named.append(f"{task.name} ({len(documents):,} documents)")
        if cut:
            remarks.append(
                f"evaluation, {task.name}: {cut:,} continuations with their contexts are longer "
                f"than data.seq_length = {length}; the beginning of these contexts is cut off"
            )
    packing = Packing(rows, length, encoder.eod, together=together)
    share = len(packing) / config.training.global_batch_size
    remarks.append(
        f"evaluation every {config.evaluation.every} steps: {', '.join(named)}; {len(rows):,} "
        f"continuations in {len(packing):,} sequences, {share:.1f} times "
        "training.global_batch_size"
    )
    return Prepared(packing, questions, remarks)


def _row(
    context: str, continuation: str, encoder: _Encoder, length: int, task: str
) -> tuple[Row, bool]:
    """The row of a continuation, and whether its context is cut on the left.

    Context and continuation are encoded apart, as in ai2-olmo-eval; an empty context is the end of
    a document.
    """
    before, scored = encoder.encode(context) or [encoder.eod], encoder.encode(continuation)
    if not scored or len(scored) > length:
        raise UserError(
            f"{SETTING}: {task}: a continuation has {len(scored)} tokens, and the model's context "
            f"has {length} (data.seq_length); leave the task out: {continuation[:60]!r}"
        )
    tokens = before + scored
    return Row(tuple(tokens[-(length + 1) :]), len(scored)), len(tokens) > length + 1


def _numbers(values: Numbers, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)
