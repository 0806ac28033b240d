"""A run from its configuration to its end: prepare, build, resume, train, report."""

from __future__ import annotations

import math
import platform
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.find import Found, newest_good
from keel_megatron.checkpoint.identity import check_folder, check_identity, claim
from keel_megatron.checkpoint.manifest import CONFIG
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.config.errors import DivergedError
from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import (
    Batch,
    BatchSource,
    SampleOrder,
    SequenceDataset,
    validation_batches,
)
from keel_megatron.data.prepare import PreparedData, keep_tokenizer, prepare
from keel_megatron.model.compiled import keep_compiled
from keel_megatron.model.language_model import build_model
from keel_megatron.partition.flops import parameter_count
from keel_megatron.partition.stages import Partition, own_partition, require_fit
from keel_megatron.partition.table import stage_table, write_stages
from keel_megatron.runtime import doctor, exit_codes, preflight
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.runtime.parent import end_with_launcher
from keel_megatron.runtime.watchdog import Watchdog
from keel_megatron.tracking.plot import plot_loss
from keel_megatron.tracking.system import measured_machine
from keel_megatron.tracking.tags import code_tags, place_tags
from keel_megatron.tracking.tracker import Tracker, open_tracker, where
from keel_megatron.training.engines import build_engine
from keel_megatron.training.guard import Guard
from keel_megatron.training.lineage import Lineage, accept
from keel_megatron.training.loop import BeforeStep, Loop
from keel_megatron.training.stop import StopRequest, stop_requests


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    exit_code: int
    """0, or that of the request to stop (runtime/exit_codes.py)."""
    is_main: bool
    """Whether this process is global rank 0."""
    trained: bool
    """False if the run was complete before."""


def run_training(
    config_path: Path, overrides: tuple[str, ...] = (), before_step: BeforeStep | None = None
) -> Outcome:
    """Train the run that a YAML file and overrides describe, in this process of a torchrun group.

    A run folder with a checkpoint goes on from it; a complete one is left as it is.

    Args:
        config_path: the YAML file.
        overrides: `section.key=value` each.
        before_step: called before every step; tests make faults there.

    Raises:
        ConfigError: the configuration is wrong, or does not fit the number of processes.
        UserError: the text, the run's folder or the device is not as the configuration says, or
            the nodes do not fit together.
        DivergedError: training has diverged.
    """
    end_with_launcher()
    launch = Launch.from_environment()
    config = load_config(config_path, overrides, world_size=launch.world_size)
    code = exit_codes.DONE
    checked = preflight.wanted(config, launch)
    with (
        stop_requests(config.training.exit_after) as stop,
        start(
            config.parallel, config.training, launch, doctor.facts(config) if checked else None
        ) as runtime,
    ):
        remarks = preflight.check(config, runtime) if checked else []
        found = _take_folder(config, runtime)
        newest = found.path
        done = _step_of(newest) >= config.training.steps
        if done:
            if runtime.is_main:
                print(
                    f"{config.training.folder} is complete: {config.training.steps} steps, newest "
                    f"checkpoint {newest}.\nMore: training.steps=N goes on; training.name=NAME "
                    "starts another run."
                )
        else:
            lineage = runtime.from_main(lambda: accept(config, found))
            with open_tracker(
                config, runtime.rank, resume_step=_step_of(newest) if newest else None
            ) as tracker:
                stop.last_word = lambda: tracker.last_word("KILLED")
                for remark in [*remarks, *found.remarks]:
                    tracker.say(remark)
                with measured_machine(config, runtime.launch.local_rank):
                    try:
                        code = _train(config, runtime, tracker, found, lineage, stop, before_step)
                    except DivergedError:
                        if runtime.is_main:
                            exit_codes.write(config.training.folder, exit_codes.DIVERGED)
                        raise
                if code != exit_codes.DONE:
                    tracker.close("KILLED")
            # Together: a launcher takes the first that leaves for the sign to end the others.
            runtime.barrier()
        if runtime.is_main:
            exit_codes.write(config.training.folder, code)
        return Outcome(config.training.folder, code, runtime.is_main, trained=not done)


def _take_folder(config: RunConfig, runtime: Runtime) -> Found:
    """See that the run's folder is this run's; the checkpoint to go on from. Collective."""
    runtime.from_main(lambda: check_folder(config))
    if runtime.is_main:
        exit_codes.clear(config.training.folder)
    found = newest_good(config.training.folder, runtime)
    runtime.from_main(lambda: _check_checkpoint(config, found))
    return found


def _check_checkpoint(config: RunConfig, found: Found) -> None:
    """Refuse a checkpoint of another configuration."""
    if found.path is not None:
        check_identity(found.path / CONFIG, config)


def _step_of(checkpoint: Path | None) -> int:
    return folder.step_of(checkpoint) if checkpoint else 0


def _train(
    config: RunConfig,
    runtime: Runtime,
    tracker: Tracker,
    found: Found,
    lineage: Lineage,
    stop: StopRequest,
    before_step: BeforeStep | None,
) -> int:
    """Build, resume, train, conclude; the exit code."""
    _tag(config, runtime, tracker)
    lineage.report(tracker)
    if found.path is None:
        _claim(config, runtime, tracker)
    partition = runtime.from_main(lambda: _decided(config, runtime))
    data = runtime.from_main(lambda: prepare(config, tracker.say, found.state.get("data")))
    if found.path is not None:  # not before: another text may have been refused
        _claim(config, runtime, tracker)
    batches, validation = open_data(config, runtime, data)
    _announce(config, runtime, tracker, data)
    tracker.artifact(runtime.from_main(lambda: keep_tokenizer(data, config.training.folder)))
    _announce_stages(runtime, tracker, partition)
    if config.kernels.compile:
        keep_compiled(config.training.folder)
        tracker.say("kernels.compile: the first steps compile, and take longer")
    engine = build_engine(config, runtime, build_model(config, runtime, partition))
    guard = Guard(config.guard, reported=not runtime.is_main)
    with Watchdog(runtime, config.training.folder, config.hang_timeout) as watchdog:
        loop = Loop(
            config,
            runtime,
            engine,
            batches,
            validation,
            tracker,
            state.Position(),
            Saver(
                config,
                runtime,
                tracker,
                data.identity(),
                found.damaged,
                watchdog.mark,
                data.tokenizer_path.read_bytes() if runtime.is_main else b"",
            ),
            guard,
            watchdog,
            before_step,
            parts={"guard": guard, **lineage.parts()},
        )
        if found.path is not None:
            loop.restore(found.path)
            tracker.say(f"going on from {found.path}")
            _note_versions(tracker, found)
        code = loop.run(stop)
    tracker.draw_depth(ending=True)
    _conclude(config, runtime, tracker, data, loop)
    return code


def _note_versions(tracker: Tracker, found: Found) -> None:
    """Other versions may compute other last bits."""
    then, now = found.state["packages"], state.package_versions()
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            tracker.say(
                f"{name} was {then.get(name, 'absent')} when it was written, is "
                f"{now.get(name, 'absent')} now: the last bits may differ"
            )


def _decided(config: RunConfig, runtime: Runtime) -> Partition:
    """Which blocks live where: rank 0's decision, should devices differ in memory."""
    partition = own_partition(config, runtime)
    require_fit(partition, config)
    return partition


def open_data(
    config: RunConfig, runtime: Runtime, data: PreparedData
) -> tuple[BatchSource, list[Batch]]:
    """This replica's training batches and its fixed validation micro-batches."""
    seed, training = config.training.seed, config.training
    train, validation = (
        SequenceDataset(prefix, config.data.seq_length, seed)
        for prefix in (data.train_prefix, data.validation_prefix)
    )
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
    tracker.say(
        f"{model.residual}: {model.sub_layers} sub-layers in {model.blocks} blocks, hidden "
        f"{model.hidden_size}, {parameters / 1e6:.2f} M parameters"
    )
    tracker.say(
        f"{runtime.launch.world_size} process(es) on {runtime.device.type}, "
        f"{runtime.threads} thread(s) each: TP {runtime.tensor_size}"
        f"{' + SP' if parallel.sequence else ''} x PP {runtime.pipeline_size} x DP "
        f"{runtime.data_size}"
    )
    tracker.say(
        f"{data.train_tokens:,} training tokens in {data.train_documents:,} documents; "
        f"unigram entropy {data.unigram_entropy:.3f} nats per token"
    )


def _claim(config: RunConfig, runtime: Runtime, tracker: Tracker) -> None:
    """Make the folder this run's, and let MLflow have the configuration."""
    runtime.from_main(lambda: claim(config))
    tracker.artifact(tracker.folder / CONFIG)


def _tag(config: RunConfig, runtime: Runtime, tracker: Tracker) -> None:
    """Tag the MLflow run with the code and the place, whatever becomes of the run."""
    hosts = runtime.gather(socket.gethostname())
    if not runtime.is_main:
        return
    layout = (
        f"TP {runtime.tensor_size} x PP {runtime.pipeline_size} x VPP "
        f"{config.parallel.virtual_pipeline} x DP {runtime.data_size}"
    )
    cuda = runtime.device.type == "cuda"
    device = torch.cuda.get_device_name(runtime.device) if cuda else platform.machine() + " CPU"
    tracker.tags(code_tags() | place_tags(layout, device, hosts))


def _announce_stages(runtime: Runtime, tracker: Tracker, partition: Partition) -> None:
    """The stage table, shown and kept with the run."""
    for line in stage_table(partition):
        tracker.say(line)
    if runtime.is_main:
        saved = tracker.folder / "stages.json"
        write_stages(partition, saved)
        tracker.artifact(saved)


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
    compared = f": {abs(below):.3f} nats {'below' if below >= 0 else 'ABOVE'} it"
    tracker.say(
        f"validation loss {loop.validation_loss:.3f} nats per token; unigram entropy "
        f"{data.unigram_entropy:.3f}{compared if math.isfinite(below) else ''}"
    )
    if runtime.is_main:
        picture = config.training.folder / "loss.png"
        try:
            plot_loss(config.training.folder, picture, data.unigram_entropy)
            tracker.artifact(picture)
        except Exception as error:  # the run is complete and saved, whatever ails its picture
            tracker.say(f"cannot draw {picture}: {type(error).__name__}: {error}")
        for line in where(config):
            tracker.say(line)
