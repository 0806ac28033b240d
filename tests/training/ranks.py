"""What the ranks of the training tests run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch
from keel_megatron.runtime.distributed import Runtime, start


def made_up_batches(config: RunConfig, runtime: Runtime, step: int) -> list[Batch]:
    """This replica's micro-batches of a step's global batch of random tokens."""
    training, s = config.training, config.data.seq_length
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (training.global_batch_size, s + 1)
    rows = torch.randint(0, config.data.vocab_size, shape, generator=generator)
    size = training.micro_batch_size
    count = training.global_batch_size // (size * runtime.data_size)
    batches = []
    documents = made_up_documents(training.global_batch_size, s + 1, step)
    follows = (documents[:, 1:] == documents[:, :-1]).float()
    for number in range(count):
        first = (number * runtime.data_size + runtime.data_rank) * size
        mine = slice(first, first + size)
        part = rows[mine]
        batch = Batch(
            tokens=part[:, :-1].contiguous(),
            labels=part[:, 1:].contiguous(),
            loss_mask=follows[mine] if config.data.masks_eod_loss else torch.ones(size, s),
            position_ids=torch.arange(s).expand(size, s).contiguous(),
        )
        if config.data.document_masks:
            batch = replace(batch, documents=documents[mine, :-1].contiguous())
        if config.model.stream == "bf16_stochastic":
            start = step * training.global_batch_size + first
            batch = replace(batch, sequences=torch.arange(start, start + size))
        batches.append(batch)
    return batches


def made_up_documents(sequences: int, length: int, seed: int) -> Tensor:
    """Numbers of documents of about six tokens, int32 [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(sequences, length, generator=generator) < 1 / 6
    starts[:, 0] = False
    return starts.cumsum(1).int()


def train_all(runs: list[dict[str, dict[str, Any]]], steps: int) -> list[list[tuple[float, float]]]:
    """`train_steps` of several runs, one after the other in the same processes."""
    return [train_steps(sections, steps) for sections in runs]


def train_steps(sections: dict[str, dict[str, Any]], steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of some steps, then the validation loss twice."""
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        found = []
        for step in range(steps):
            batches = made_up_batches(config, runtime, step)
            result = engine.train_step(batches, len(batches), config.optimizer.learning_rate)
            found.append((result.loss, result.grad_norm))
        batches = made_up_batches(config, runtime, 99)
        loss = engine.validate(batches, len(batches))
        return [*found, (loss, loss)]


def observed_steps(sections: dict[str, dict[str, Any]], steps: int) -> list[tuple[float, float]]:
    """Losses and gradient norms of steps of which the 1st and 4th are observed; a validation."""
    from keel_megatron.depth.collector import DepthCollector
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        found = []
        for step in range(1, steps + 1):
            batches = made_up_batches(config, runtime, step)
            depth = DepthCollector(engine) if step in (1, 4) else None
            result = engine.train_step(batches, len(batches), 1e-3, depth=depth)
            if depth is not None:
                assert depth.profile(step).alarm() is None
            found.append((result.loss, result.grad_norm))
        return [*found, (engine.validate(batches, len(batches)), 0.0)]
