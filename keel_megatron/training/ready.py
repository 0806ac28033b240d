"""Preparation of a run before its first step; errors are found before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import (
    Batches,
    BatchSource,
    SampleOrder,
    SequenceDataset,
    validation_batches,
)
from keel_megatron.data.prepare import PreparedData, prepare
from keel_megatron.engines.base import Engine
from keel_megatron.engines.build import build_engine
from keel_megatron.layout.stage_table import stage_table, summary
from keel_megatron.layout.stages import Partition, own_partition, require_fit
from keel_megatron.mlflow_delivery.reporting import check_records
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ready:
    """A prepared run."""

    config: RunConfig
    runtime: Runtime
    resume: ResumePoint
    """The checkpoint to resume from."""
    partition: Partition
    data: PreparedData
    batches: Batches
    engine: Engine


def get_ready(config: RunConfig, runtime: Runtime, resume: ResumePoint, say: Say) -> Ready:
    """Balance the stages, prepare the data, build the model; the run's folder is not changed.

    Args:
        config: the run.
        runtime: this rank's runtime.
        resume: the checkpoint to resume from.
        say: called with messages; shown on rank 0.

    Raises:
        UserError: the model does not fit, the text does not match the configuration or the
            checkpoint, the records cannot be continued, or a library is missing.
    """
    partition = runtime.from_main(lambda: _decided(config, runtime))
    runtime.from_main(lambda: check_records(config.training.folder))
    data = runtime.from_main(lambda: prepare(config, say, resume.state.get("data")))
    batches = open_batches(config, runtime, data)
    _announce(config, runtime, say, data)
    for line in [*stage_table(partition), summary(partition)]:
        say(line)
    if config.kernels.compile:
        say("kernels.compile: the first steps compile, and take longer")
    engine = build_engine(config, runtime, build_model(config, runtime, partition))
    return Ready(config, runtime, resume, partition, data, batches, engine)


def _decided(config: RunConfig, runtime: Runtime) -> Partition:
    """The assignment of blocks to stages, by rank 0, since devices may differ in memory."""
    partition = own_partition(config, runtime)
    require_fit(partition, config)
    return partition


def open_batches(config: RunConfig, runtime: Runtime, data: PreparedData) -> Batches:
    """This replica's training batches and its fixed validation micro-batches.

    Only what this stage uses of them: tokens on the first, labels on the last.
    """
    seed, training = config.training.seed, config.training
    train, validation = (
        SequenceDataset(prefix, config.data.seq_length, seed)
        for prefix in (data.train_prefix, data.validation_prefix)
    )
    used = {
        "tokens": runtime.pipeline_rank == 0,
        "labels": runtime.pipeline_rank == runtime.pipeline_size - 1,
    }
    source = BatchSource(
        train,
        SampleOrder(len(train), seed),
        training.micro_batch_size,
        runtime.data_rank,
        runtime.data_size,
        **used,
    )
    fixed = validation_batches(
        validation,
        training.validation_sequences,
        training.micro_batch_size,
        runtime.data_rank,
        runtime.data_size,
        multiple=config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1,
    )
    return Batches(source, [batch.only(**used) for batch in fixed])


def _announce(config: RunConfig, runtime: Runtime, say: Say, data: PreparedData) -> None:
    """Report model, devices and data."""
    model, parallel = config.model, config.parallel
    parameters = parameter_count(model, config.data.vocab_size)
    say(
        f"{model.residual}: {model.sub_layers} sub-layers in {model.blocks} blocks, hidden "
        f"{model.hidden_size}, {parameters / 1e6:.2f} M parameters"
    )
    say(
        f"{runtime.launch.world_size} process(es) on {runtime.device.type}, "
        f"{runtime.threads} thread(s) each: TP {runtime.tensor_size}"
        f"{' + SP' if parallel.sequence else ''} x PP {runtime.pipeline_size} x DP "
        f"{runtime.data_size}"
    )
    say(
        f"{data.train_tokens:,} training tokens in {data.train_documents:,} documents; "
        f"unigram entropy {data.unigram_entropy:.3f} nats per token"
    )
