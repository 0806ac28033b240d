"""Preparation of a run before its first step; errors are found before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.config.run import RunConfig
from keel_megatron.config.unused import unused_settings
from keel_megatron.data.batches import (
    Batches,
    BatchSource,
    Uses,
    ValidationSet,
    validation_batches,
)
from keel_megatron.data.blend import BLOCK, shares
from keel_megatron.data.dataset import Dataset, Part, Source
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.samples import Samples
from keel_megatron.data.sequences import SequenceDataset
from keel_megatron.engines.base import Engine
from keel_megatron.engines.build import build_engine
from keel_megatron.evaluation.in_training import Evaluation, open_evaluation
from keel_megatron.layout.stage_table import stage_table, summary
from keel_megatron.layout.stages import Partition, own_partition, require_fit
from keel_megatron.mlflow_delivery.reporting import check_records
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.tables import count
from keel_megatron.training.dataset import opened, ready_dataset
from keel_megatron.training.initialize import Start, open_start
from keel_megatron.training.origin import on_data_of_position

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ready:
    """A prepared run."""

    config: RunConfig
    runtime: Runtime
    resume: ResumePoint
    """The checkpoint to resume from."""
    partition: Partition
    data: Dataset
    batches: Batches
    engine: Engine
    evaluation: Evaluation | None = None
    """The tasks that are evaluated; None: none."""
    start: Start | None = None
    """What a new run starts from; None: it resumes, or starts from random weights."""


def get_ready(
    config: RunConfig, runtime: Runtime, resume: ResumePoint, folder: Path | None, say: Say
) -> Ready:
    """Balance the stages, open the data, build the model; the run's folder is not changed.

    Args:
        config: the run.
        runtime: this rank's runtime.
        resume: the checkpoint to resume from.
        folder: the dataset folder that is ready; None: the run seemed complete before.
        say: called with messages; shown on rank 0.

    Raises:
        UserError: the model does not fit, the dataset does not match the configuration or the
            checkpoint, the run cannot start from training.initialize_from, a task of
            evaluation.tasks cannot be read, the records cannot be continued, or a library is
            missing.
    """
    partition = runtime.from_main(lambda: _decided(config, runtime))
    runtime.from_main(lambda: check_records(config.training.folder))
    launch, expected = runtime.launch, resume.state.get("data")
    if folder is None:
        local = launch.world_size == launch.local_world_size
        folder = runtime.from_main(lambda: ready_dataset(config, say, on_one_machine=local))
    start = open_start(config, runtime, resume)
    continues = None if start is None else start.continues
    if continues is not None:
        expected = continues.state.get("data")
    with on_data_of_position(kept=continues is not None):
        data = runtime.from_main(lambda: opened(config, folder, expected))
    if start is not None:
        start.check_tokenizer(data)
        for remark in start.remarks:
            say(remark)
    batches = open_batches(config, runtime, data, say)
    _announce(config, runtime, say, data, batches)
    for line in [*stage_table(partition), summary(partition)]:
        say(line)
    if config.kernels.compile:
        say("kernels.compile: the first steps compile, and take longer")
    evaluation = open_evaluation(config, runtime, data.tokenizer_path, say)
    engine = build_engine(config, runtime, build_model(config, runtime, partition))
    return Ready(config, runtime, resume, partition, data, batches, engine, evaluation, start)


def _decided(config: RunConfig, runtime: Runtime) -> Partition:
    """The assignment of blocks to stages, by rank 0, since devices may differ in memory."""
    partition = own_partition(config, runtime)
    require_fit(partition, config)
    return partition


def open_batches(
    config: RunConfig, runtime: Runtime, data: Dataset, say: Say = lambda _text: None
) -> Batches:
    """This replica's training batches and its fixed validation micro-batches.

    Only what this stage uses of them: tokens on the first, labels on the last.
    """
    training, settings = config.training, config.data

    def sequences(source: Source, part: Part) -> SequenceDataset:
        return open_sequences(
            data, source, part, settings.seq_length, training.seed, settings.cache_dir, say
        )

    uses = Uses(
        tokens=runtime.pipeline_rank == 0,
        labels=runtime.pipeline_rank == runtime.pipeline_size - 1,
        documents=settings.document_masks,
        loss_mask=settings.masks_eod_loss,
        counts=data.has_masks,
        sequences=config.model.stream == "bf16_stochastic",
    )
    train = [sequences(source, "train") for source in data.sources]
    source = BatchSource(
        Samples(train, list(data.quotas.values()), training.seed),
        training.micro_batch_size,
        runtime.data_rank,
        runtime.data_size,
        uses,
    )
    validation = [
        ValidationSet(
            one.name,
            data.quotas[one.name],
            list(
                validation_batches(
                    sequences(one, "validation"),
                    training.validation_sequences,
                    training.micro_batch_size,
                    runtime.data_rank,
                    runtime.data_size,
                    multiple=config.parallel.pipeline
                    if config.parallel.virtual_pipeline > 1
                    else 1,
                    uses=uses,
                )
            ),
        )
        for one in data.sources
    ]
    return Batches(source, validation)


def _announce(
    config: RunConfig, runtime: Runtime, say: Say, data: Dataset, batches: Batches
) -> None:
    """Report model, devices, data and settings without effect."""
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
        f"{data.tokens('train'):,} training tokens in "
        f"{count(data.documents('train'), 'document')}; "
        f"unigram entropy {data.manifest.unigram_entropy:.3f} nats per token"
    )
    for line in unused_settings(config):
        say(f"warning: {line}")
    if len(data.sources) > 1:
        say(f"shares of the samples: {shares(data.quotas, BLOCK)}")
    if data.has_masks:
        steps = config.training.steps
        samples = config.batch_sizes.samples_of(steps)
        epochs = batches.train.samples.describe(samples)
        say(f"training.steps: {steps} steps, {samples} sequences: {epochs}")
