"""A run from its configuration to its end: prepare, build, resume, train, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.identity import claim
from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import (
    Batch,
    BatchSource,
    SampleOrder,
    build_dataset,
    validation_batches,
)
from keel_megatron.data.prepare import PreparedData, prepare
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.model.language_model import build_model
from keel_megatron.partition.flops import parameter_count
from keel_megatron.partition.layout import even_layout
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.tracking.plot import plot_loss
from keel_megatron.tracking.tracker import Tracker, open_tracker, where
from keel_megatron.training.engine import MegatronEngine
from keel_megatron.training.loop import Loop
from keel_megatron.training.stop import StopRequest, stop_requests


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    exit_code: int
    """0, or 128 + the signal that asked it to stop."""
    is_main: bool
    """Whether this process is global rank 0."""
    trained: bool
    """False if the run was complete before."""


def run_training(config_path: Path, overrides: tuple[str, ...] = ()) -> Outcome:
    """Train the run that a YAML file and overrides describe, in this process of a torchrun group.

    A run folder with a checkpoint goes on from it; a complete one is left as it is.

    Raises:
        ConfigError: the configuration is wrong, or does not fit the number of processes.
        UserError: the text, the run's folder or the device is not as the configuration says.
    """
    launch = Launch.from_environment()
    config = load_config(config_path, overrides, world_size=launch.world_size)
    with stop_requests() as stop, start(config.parallel, config.training) as runtime:
        newest = runtime.from_main(lambda: _claimed(config))
        done = _step_of(newest) >= config.training.steps
        if done:
            if runtime.is_main:
                print(
                    f"{config.training.folder} is complete: {config.training.steps} steps, newest "
                    f"checkpoint {newest}.\nMore: training.steps=N goes on; training.name=NAME "
                    "starts another run."
                )
        else:
            with open_tracker(
                config, runtime.rank, resume_step=_step_of(newest) if newest else None
            ) as tracker:
                _train(config, runtime, tracker, newest, stop)
                if stop:
                    tracker.close("KILLED")
        code = stop.exit_code if stop else 0
        return Outcome(config.training.folder, code, runtime.is_main, trained=not done)


def _claimed(config: RunConfig) -> Path | None:
    """Take the run's folder; its newest checkpoint."""
    claim(config)
    return folder.latest(config.training.folder)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step_")) if checkpoint else 0


def _train(
    config: RunConfig,
    runtime: Runtime,
    tracker: Tracker,
    newest: Path | None,
    stop: StopRequest,
) -> None:
    data = runtime.from_main(lambda: prepare(config, tracker.say))
    batches, validation = _open_data(config, runtime, data)
    _announce(config, runtime, tracker, data)
    engine = MegatronEngine(config, runtime, build_model(config, runtime))
    position = state.Position()
    if newest is not None:
        position = state.load(newest, config, runtime, engine.chunks, engine.optimizer)
        tracker.say(f"going on from {newest}")
    loop = Loop(
        config, runtime, engine, batches, validation, tracker, position, saved_step=position.step
    )
    loop.run(stop)
    tracker.draw_depth(ending=True)
    _conclude(config, runtime, tracker, data, loop)


def _open_data(
    config: RunConfig, runtime: Runtime, data: PreparedData
) -> tuple[BatchSource, list[Batch]]:
    """This replica's training batches and its fixed validation micro-batches."""
    tokenizer = Tokenizer(data.tokenizer_path)
    seed, training = config.training.seed, config.training

    def datasets() -> tuple[Any, Any]:
        return tuple(
            build_dataset(prefix, tokenizer, config.data.seq_length, seed, data.folder)
            for prefix in (data.train_prefix, data.validation_prefix)
        )

    # Rank 0 writes the indices that the others then read.
    if runtime.is_main:
        train, validation = datasets()
    runtime.barrier()
    if not runtime.is_main:
        train, validation = datasets()
    source = BatchSource(
        train,
        SampleOrder(len(train), seed),
        training.micro_batch_size,
        runtime.data_rank,
        runtime.data_size,
    )
    fixed = validation_batches(
        validation,
        training.validation_sequences,
        training.micro_batch_size,
        runtime.data_rank,
        runtime.data_size,
        multiple=config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1,
    )
    return source, list(fixed)


def _announce(config: RunConfig, runtime: Runtime, tracker: Tracker, data: PreparedData) -> None:
    """What is about to be trained, on what, where."""
    model, parallel = config.model, config.parallel
    parameters = parameter_count(model, config.data.vocab_size)
    layout = even_layout(model.blocks, parallel.pipeline, parallel.virtual_pipeline)
    stages = " | ".join(
        "+".join(str(chunk.blocks) for chunk in layout.stage(rank))
        for rank in range(parallel.pipeline)
    )
    tracker.say(
        f"{model.residual}: {model.sub_layers} sub-layers in {model.blocks} blocks, hidden "
        f"{model.hidden_size}, {parameters / 1e6:.2f} M parameters"
    )
    tracker.say(
        f"{runtime.launch.world_size} process(es) on {runtime.device.type}, "
        f"{runtime.threads} thread(s) each: TP {runtime.tensor_size}"
        f"{' + SP' if parallel.sequence else ''} x PP {runtime.pipeline_size} x DP "
        f"{runtime.data_size}; blocks by stage: {stages}"
    )
    tracker.say(
        f"{data.train_tokens:,} training tokens in {data.train_documents:,} documents; "
        f"unigram entropy {data.unigram_entropy:.3f} nats per token"
    )


def _conclude(
    config: RunConfig, runtime: Runtime, tracker: Tracker, data: PreparedData, loop: Loop
) -> None:
    """What the run reached, beside what counting tokens alone would."""
    step, steps = loop.position.step, config.training.steps
    if step < steps:
        tracker.say(
            f"stopped after step {step} of {steps}, checkpoint written; "
            "the same command goes on from there"
        )
        return
    below = data.unigram_entropy - loop.validation_loss
    tracker.say(
        f"validation loss {loop.validation_loss:.3f} nats per token; unigram entropy "
        f"{data.unigram_entropy:.3f}: {abs(below):.3f} nats "
        f"{'below' if below >= 0 else 'ABOVE'} it"
    )
    if runtime.is_main:
        picture = config.training.folder / "loss.png"
        plot_loss(config.training.folder, picture, data.unigram_entropy)
        tracker.artifact(picture)
        for line in where(config):
            tracker.say(line)
